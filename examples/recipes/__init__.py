"""The networks of the papers, with their hyper-parameters: ``examples/train_recipe.py`` trains them."""
