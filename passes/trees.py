"""How arguments and results are made of tensors and constants: PyTorch's trees of containers.

Owns which containers are plain, and what the leaves are called. It must not know models or graphs.
"""

import re
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = (tuple, list, dict, OrderedDict, defaultdict, deque, namedtuple)


def is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a tree is made of containers that hold whatever they are given: Python's own, and kinds of dicts.

    Example:
        >>> is_plain(pytree.tree_structure([1, {"x": (2, None)}]))
        True
    """
    return spec.is_leaf() or (holds_anything(spec.type) and all(map(is_plain, spec.children())))


def holds_anything(kind: Any) -> bool:
    """Whether containers of this type, as a tree names it, hold whatever they are given.

    Example:
        >>> holds_anything(dict), holds_anything(slice)
        (True, False)
    """
    return kind in _PLAIN or (isinstance(kind, type) and issubclass(kind, dict | tuple))


def leaf_paths(spec: pytree.TreeSpec) -> list[tuple[str, ...]]:
    """The steps to each leaf: keys, names of fields, numbers of places.

    Example:
        >>> leaf_paths(pytree.tree_structure([1, {"x": (2, 3)}]))
        [('0',), ('1', 'x', '0'), ('1', 'x', '1')]
    """
    if spec.is_leaf():
        return [()]
    children = spec.children()
    steps = steps_of(spec, len(children))
    return [(step, *rest) for step, child in zip(steps, children, strict=True) for rest in leaf_paths(child)]


def steps_of(spec: pytree.TreeSpec, count: int) -> Sequence[str]:
    """What the ``count`` children of a container are called; their numbers where it does not say.

    Example:
        >>> steps_of(pytree.tree_structure({"x": 1, "y": 2}), 2)
        ['x', 'y']
    """
    try:
        made = pytree.SUPPORTED_NODES[spec.type].unflatten_fn(list(range(count)), spec.context)
        found = pytree.tree_flatten_with_path(made, is_leaf=lambda one: one is not made)[0]
        if len(found) == count:
            return [_text(path[0]) for path, _ in found]
    except Exception:  # a registered class that wants its own contents: any type
        first = spec.context[0] if isinstance(spec.context, list | tuple) and spec.context else None
        if isinstance(first, list | tuple) and len(first) == count:  # the keys, in the caches of transformers
            return [str(key) for key in first]
    return [str(index) for index in range(count)]


def _text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def identifiers(paths: Iterable[Sequence[str]]) -> list[str]:
    """Different names of Python for paths.

    Example:
        >>> identifiers([("cache", "keys", "0"), ("cache", "keys 0"), ("0",)])
        ['cache_keys_0', 'cache_keys_0_2', 'input_0']
    """
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W", "_", "_".join(path))
        name = name if name.isidentifier() and not name.startswith("_") else f"input_{name}"
        candidate, number = name, 2
        while candidate in names:
            candidate, number = f"{name}_{number}", number + 1
        names.append(candidate)
    return names
