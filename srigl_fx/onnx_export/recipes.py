"""The recipe of a model in its ONNX file: an entry of the metadata, written, read, and joined where files are joined.

Owns that entry. It must not know how a recipe comes about, or what else a file holds.

``onnx.compose`` refuses two files that have one key with two values: the key therefore ends in a digest of the value,
and two files with two recipes can be joined by any tool, and hold both.

Recipes bring PyTorch along, so they are imported where one is read or written: who looks at a file needs none.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from srigl_fx.recipes import Recipe

KEY = "srigl_fx.recipe."  # and the digest


def put(model: "onnx.ModelProto", recipes: "Mapping[str, Recipe]") -> None:
    """Write the recipes of a model's parts into its metadata; nothing where there are none.

    Example:
        >>> import onnx
        >>> from srigl_fx.recipes import Recipe
        >>> model = onnx.ModelProto()
        >>> put(model, {"encoder": Recipe(seed=3)})
        >>> found(model)["encoder"].seed
        3
    """
    if recipes:
        from srigl_fx.recipe_parts import to_plain

        text = json.dumps(to_plain(recipes))
        model.metadata_props.add(key=KEY + hashlib.sha256(text.encode()).hexdigest()[:16], value=text)


def found(model: "onnx.ModelProto") -> "dict[str, Recipe]":
    """The recipes in a file's metadata by the names of parts; "" is the whole model. Empty where there are none.

    Files that another tool has joined are parts that are named by numbers, from "1".

    Raises:
        RecipeError: They are damaged, or of a newer version.

    Example:
        >>> import onnx
        >>> found(onnx.ModelProto())
        {}
    """
    from srigl_fx.recipe_parts import from_plain
    from srigl_fx.recipes import parse

    held = [from_plain(parse(entry.value)) for entry in model.metadata_props if entry.key.startswith(KEY)]
    return join(held, _numbers(held))


def take(model: "onnx.ModelProto") -> "dict[str, Recipe]":
    """What :func:`found` finds, which is taken out of the metadata.

    Raises:
        RecipeError: They are damaged, or of a newer version.

    Example:
        >>> import onnx
        >>> from srigl_fx.recipes import Recipe
        >>> model = onnx.ModelProto()
        >>> put(model, {"": Recipe(seed=3)})
        >>> len(take(model)), len(take(model))
        (1, 0)
    """
    recipes = found(model)
    left = [entry for entry in model.metadata_props if not entry.key.startswith(KEY)]
    del model.metadata_props[:]
    model.metadata_props.extend(left)
    return recipes


def join(held: "Sequence[Mapping[str, Recipe]]", names: Sequence[str]) -> "dict[str, Recipe]":
    """The recipes of files that become one: those of each under its name, where more than one has any.

    Names that do not tell them apart are replaced by numbers, from "1".

    Example:
        >>> from srigl_fx.recipes import Recipe
        >>> encoder, head = {"": Recipe(seed=1)}, {"": Recipe(seed=2), "norm": Recipe(seed=3)}
        >>> list(join([encoder, head], ["encoder", "head"])), list(join([{}, head], ["encoder", "head"]))
        (['encoder', 'head', 'head.norm'], ['', 'norm'])
    """
    having = [(name, recipes) for name, recipes in zip(names, held, strict=True) if recipes]
    if len(having) == 1:
        return dict(having[0][1])
    joined = {
        f"{name}.{part}" if part else name: recipe for name, recipes in having for part, recipe in recipes.items()
    }
    lost = len(joined) < sum(len(recipes) for _, recipes in having)
    return join(held, _numbers(held)) if lost else joined


def _numbers(files: Sequence[object]) -> list[str]:
    return [str(number + 1) for number in range(len(files))]
