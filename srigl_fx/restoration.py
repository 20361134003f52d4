"""Giving a dense model the masks back that were saved beside its weights.

Owns the pipeline of passes for that. It must not know how masks are saved or where they come from.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from srigl_fx.errors import RecipeError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.follow_recipe import FollowRecipe
from srigl_fx.passes.given_masks import GivenMasks
from srigl_fx.passes.insert_masks import InsertMasks
from srigl_fx.recipes import Recipe
from srigl_fx.train import distributed

Model = TypeVar("Model", bound=nn.Module)


def restore(
    model: Model,
    recipe: Recipe,
    masks: Mapping[str, Tensor],
    *,
    pruning: bool = False,
    example_inputs: Any = None,
) -> Model:
    """Make a dense model sparse again, in place, and return the same object; its weights are not changed.

    Args:
        model: A model that holds the weights which were saved, zero off the masks. It may have weights that the recipe
            does not name: those are left alone.
        recipe: The recipe of the model that was saved.
        masks: Its masks by the weights' names, as :func:`srigl_fx.masks.named_masks` gives them.
        pruning: Whether the masks may keep more than their budgets, as they do while a model is pruned gradually.
        example_inputs: As for :func:`srigl_fx.sparsify`; needed where that needed them to find the weights.

    Raises:
        RecipeError: Recipe or masks do not fit the model, or it has masks already.
        SparsifyError: The masks are none that the recipe allows.

    In each case the model is as it was.

    Example:
        >>> import copy, torch, srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(64, 32)), sparsity=0.5)
        >>> recipe, masks = sx.recipe(model), dict(sx.masks.named_masks(model))
        >>> again = restore(sx.finalize(copy.deepcopy(model)), recipe, masks)
        >>> torch.equal(again[0].weight_mask, model[0].weight_mask)
        True
    """
    if done := sparse_weights(model):
        raise RecipeError(f"the model has masks already ({done[0].fqn!r} has one): restore them on a dense model")
    distributed.check_unwrapped(model, "sparsify")
    draft = Draft(model, asked=replace(recipe, weights=()))
    steps = (
        Discover(example_inputs),
        FollowRecipe(decisions=recipe.weights, may_have_more=True),
        GivenMasks(masks=masks, pruning=pruning),
        InsertMasks(),
    )
    run(steps, draft)
    distributed.ignore_masks(model)
    return model
