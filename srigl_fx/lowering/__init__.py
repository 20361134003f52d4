"""From a model with masks to condensed operators."""
