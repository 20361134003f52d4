"""The recipes of a model's parts, by the names of the parts: together as plain data, and in words.

Owns what a file holds where parts were sparsified by calls of their own. It must not know how the recipes of a model
are found (:mod:`srigl_fx.recipes`).

What is read is untrusted: every value is checked.
"""

from collections.abc import Mapping
from typing import Any

from srigl_fx.errors import RecipeError
from srigl_fx.recipes import Recipe


def parts_of(found: Mapping[str, Recipe]) -> str:
    """What an error says of a file's recipes where a part that it was asked for is not among them, or is needed.

    Example:
        >>> parts_of({"": Recipe()})
        'one recipe, of the whole model: leave the part out'
        >>> parts_of({"encoder": Recipe(), "head": Recipe()})
        "recipes of the parts 'encoder', 'head': name one of them as the part"
    """
    if list(found) == [""]:
        return "one recipe, of the whole model: leave the part out"
    return f"recipes of the parts {', '.join(map(repr, found))}: name one of them as the part"


def only(found: Mapping[str, Recipe]) -> Recipe | None:
    """The recipe of a model that was sparsified by one call, else None.

    Example:
        >>> only({}), only({"": Recipe(sparsity=0.5)}).sparsity
        (None, 0.5)
    """
    return next(iter(found.values())) if len(found) == 1 else None


def to_plain(found: Mapping[str, Recipe]) -> dict[str, Any]:
    """The recipes of a model's parts as plain data, as JSON holds it.

    Example:
        >>> from_plain(to_plain({"encoder": Recipe(seed=3)}))["encoder"].seed
        3
    """
    return {part: one.to_dict() for part, one in found.items()}


def from_plain(data: Any) -> dict[str, Recipe]:
    """The inverse of :func:`to_plain`; empty for what was saved before there were recipes.

    Raises:
        RecipeError: ``data`` holds anything but recipes by the names of parts.

    Example:
        >>> from_plain(None)
        {}
    """
    if data is None:
        return {}
    if not isinstance(data, Mapping) or not all(isinstance(part, str) for part in data):
        raise RecipeError("its recipes are damaged: they must stand under the names of a model's parts")
    return {part: Recipe.from_dict(one) for part, one in data.items()}
