"""What a lowered module is given: arguments made as its graph takes them, of the sizes that it was captured for.

Owns how the inputs of a graph are described, and comparing arguments with that. It must not know how a model is
lowered, nor reports.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.errors import LoweringError
from srigl_fx.lowering.file import encode_tree
from srigl_fx.passes import trees
from srigl_fx.passes.capture_checks import is_free
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.hugging_face import register_caches, untold
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import ANY, BATCH, Condition, Size, Sizes, is_within, span_of

Described = Sequence[dict[str, Any] | None]

_AGAIN = "lower the model again with such example inputs"
_SHOWN = 60  # characters of a value in a message


def describe_inputs(program: Program) -> list[dict[str, Any] | None]:
    """What :meth:`~srigl_fx.lowering.lowered.LoweredModule.build` wants to know of inputs, by the values at capture."""

    def one(value: Any, free: Mapping[int, Size]) -> dict[str, Any] | None:
        if isinstance(value, Tensor):
            shape = [
                str(free[axis]) if axis in free else None if is_free(size) else int(size)
                for axis, size in enumerate(value.shape)
            ]
            limited = {name: limit for name, limit in program.sizes.limits.items() if name in shape}
            limits = {name: list(limit) for name, limit in limited.items() if limit != ANY}
            described = {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
            return {**described, "limits": limits} if limits else described
        return {"value": value} if isinstance(value, bool | int | float | str) else None

    values = [node.meta.get("val") for node in program.module.graph.find_nodes(op="placeholder")]
    found = [one(value, free) for value, free in zip(values, program.sizes.axes or ({},) * len(values), strict=True)]
    first = next((item for item in found if item is not None and "shape" in item), None)
    if first is not None and program.sizes.conditions:
        first["conditions"] = [str(condition) for condition in program.sizes.conditions]
    return found


def sizes_of(described: Described) -> Sizes:
    """The free sizes of inputs that are described.

    Example:
        >>> [str(axes[0]) for axes in sizes_of([{"dtype": "float32", "shape": ["batch", 3]}]).axes]
        ['batch']
    """

    def free(item: dict[str, Any] | None) -> dict[int, Size]:
        shape = (item or {}).get("shape", ())
        return {axis: Size.parse(size) for axis, size in enumerate(shape) if isinstance(size, str)}

    limits = {
        name: (least, most) for item in described for name, (least, most) in (item or {}).get("limits", {}).items()
    }
    conditions = [Condition.parse(text) for item in described for text in (item or {}).get("conditions", ())]
    return Sizes(axes=tuple(map(free, described)), limits=limits, conditions=tuple(conditions))


def is_description(item: Any) -> bool:
    """Whether an item of a file describes an input.

    Example:
        >>> is_description({"value": 2}), is_description({"dtype": "float32", "shape": [None, -1]})
        (True, False)
    """
    if "value" in item:
        return isinstance(item["value"], bool | int | float | str)
    numbers = [size for size in item["shape"] if size is not None and not isinstance(size, str)]
    names = [Size.parse(size) for size in item["shape"] if isinstance(size, str)]  # raises where that is no name
    conditions = item.get("conditions", [])
    if not isinstance(conditions, list) or any(not isinstance(text, str) for text in conditions):
        return False
    for text in conditions:
        Condition.parse(text)  # raises where that is none
    return (
        isinstance(getattr(torch, item["dtype"]), torch.dtype)
        and len(names) + len(numbers) <= len(item["shape"])
        and all(type(size) is int and size >= 0 for size in numbers)
        and all(
            any(name == size.name for size in names) and type(least) is int and (most is None or type(most) is int)
            for name, (least, most) in item.get("limits", {}).items()
        )
    )


def with_names(described: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """Descriptions from a file of before sizes had names: there, equal numbers tie leading sizes.

    Example:
        >>> with_names([{"dtype": "float32", "shape": [None, 3], "batch": 0}])
        [{'dtype': 'float32', 'shape': ['batch', 3]}]
    """

    def one(item: dict[str, Any] | None) -> dict[str, Any] | None:
        if item is None or "batch" not in item:
            return item
        tie, shape = int(item["batch"]), item["shape"]
        kept = {key: value for key, value in item.items() if key != "batch"}
        return {**kept, "shape": [f"{BATCH}_{tie}" if tie else BATCH, *shape[1:]]}

    return list(map(one, described))


def arranged(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Arguments in the containers that the graph takes; those that are so already are returned as they are.

    A cache of Hugging Face transformers becomes the lists of tensors that a graph from a file takes in its place, a
    tuple the list that it stands for. What is given is not changed.

    Raises:
        LoweringError: An argument is made otherwise; the message names what differs.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 4)), sparsity=0.5).eval()
        >>> lowered = sx.lower(model, (torch.ones(1, 8),), min_speedup=0)
        >>> arranged(lowered, (2,), {})
        ((2,), {})
    """
    made, missing = _values(module, args, kwargs)
    if made is None:
        return args, kwargs
    return tuple(made[: len(args)]), dict(zip(missing, made[len(args) :], strict=True))


def check_inputs(module: fx.GraphModule, described: Described, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments as :func:`arranged` makes them, after a look at what the graph has built in: sizes and constants.

    Args:
        module: The lowered module.
        described: Its inputs, as :func:`describe_inputs` describes them.
        args: The arguments of a call.
        kwargs: Its keyword arguments.

    Raises:
        LoweringError: The graph was captured for other arguments; the message names the first that differs.
    """
    made, missing = _values(module, args, kwargs)
    if made is None:
        return args, kwargs
    leaves = made if all(isinstance(value, Tensor) for value in made) else pytree.tree_leaves(made)
    named: dict[str, tuple[int, int]] = {}  # for each named size, the input that has shown it, and the number
    sums: list[tuple[int, int, Size, int]] = []  # inputs and axes with sums of them, and what they were given
    for position, (leaf, wanted) in enumerate(zip(leaves, described, strict=True)):
        if wanted is None:
            continue
        remedy = _AGAIN
        if "value" in wanted:
            fits = leaf == wanted["value"]
            given, needed = repr(leaf), f"the constant {wanted['value']!r}"
        else:
            shape = wanted["shape"]
            sizes = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
            if wanted.get("any_rank"):
                shape, sizes = shape[-1:], sizes[-1:]
            fits = isinstance(leaf, Tensor) and len(sizes) == len(shape)
            fits = fits and all(
                not isinstance(size, int) or size == have for size, have in zip(shape, sizes, strict=True)
            )
            if isinstance(leaf, Tensor) and str(leaf.dtype) != "torch." + wanted["dtype"]:
                fits, remedy = False, f"give it as {wanted['dtype']}"
            given = f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            dimensions = ", ".join(str(size) if isinstance(size, int) else "any" for size in shape)
            needed = f"{wanted['dtype']} ({'..., ' if wanted.get('any_rank') else ''}{dimensions})"
        if not fits:
            raise LoweringError(
                f"input {position} of the lowered module{_path(module, position)} is {given}, but the graph was "
                f"captured for {needed}: {remedy}"
            )
        if "value" in wanted or wanted.get("any_rank"):
            continue
        for axis, size in enumerate(wanted["shape"]):
            if isinstance(size, str):
                free, given_size = Size.parse(size), leaf.shape[axis]
                if free.name is None:
                    sums.append((position, axis, free, given_size))
                    continue
                first, known = named.setdefault(size, (position, given_size))
                if given_size != known:
                    raise LoweringError(
                        f"input {position} of the lowered module has {size} {given_size} and input {first} has "
                        f"{known}: give them the same, as the model asks for"
                    )
    sizes_wanted = sizes_of(described)
    for name, (least, most) in sizes_wanted.limits.items():
        if name in named and not is_within(named[name][1], least, most):
            position, given_size = named[name]
            raise LoweringError(
                f"input {position} of the lowered module{_path(module, position)} has {name} {given_size}, and the "
                f"graph is right {span_of(least, most)}: {_AGAIN.replace('such', 'other')}, or another range"
            )
    values = {name: size for name, (_, size) in named.items()}
    for condition in sizes_wanted.conditions:
        if values.keys() >= set(condition.names) and not condition.holds(values):
            raise LoweringError(
                f"the inputs of the lowered module have {_standing(module, described, values, condition)}, and "
                f"{condition.words}, as the model asks for: {_AGAIN.replace('such', 'other')}, or give such sizes"
            )
    for position, axis, free, given_size in sums:
        if values.keys() >= {name for name, _ in free.terms} and free.at(values) != given_size:
            shown = ", ".join(f"{name} {values[name]}" for name, _ in free.terms)
            raise LoweringError(
                f"axis {axis} of input {position} of the lowered module{_path(module, position)} is {given_size}, and "
                f"the model asks for {free}, {free.at(values)} with {shown}: give it so"
            )
    return tuple(made[: len(args)]), dict(zip(missing, made[len(args) :], strict=True))


def _standing(module: fx.GraphModule, described: Described, values: Mapping[str, int], condition: Condition) -> str:
    """The sizes of a condition that does not hold, each with the first input and axis where it stands alone."""
    paths = [" ".join((name, *path)) for name, spec in _by_argument(module) for path in trees.leaf_paths(spec)]
    places: dict[str, str] = {}
    for path, axes in zip(paths, sizes_of(described).axes, strict=True):
        for axis, size in axes.items():
            if size.name in condition.names:
                places.setdefault(size.name, f"{size.name} {values[size.name]} (axis {axis} of {path})")
    return ", ".join(places[name] for name in condition.names)


def _values(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any] | None, list[str]]:
    """All arguments in the order and the containers of the graph, and the names of those given by name.

    None where arguments are missing or too many: the call itself says what is wrong.
    """
    given = _by_argument(module)
    missing = [name for name, _ in given[len(args) :]]
    if len(args) > len(given) or set(missing) != set(kwargs):
        return None, missing
    values = [*args, *(kwargs[name] for name in missing)]
    return [_arranged(module, name, spec, value) for (name, spec), value in zip(given, values, strict=True)], missing


def _by_argument(module: fx.GraphModule) -> list[tuple[str, pytree.TreeSpec]]:
    """Names of the arguments, and how each is made."""
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    positional, named = info.in_spec.children()
    return list(zip(info.orig_args, [*positional.children(), *named.children()], strict=True))


def _path(module: fx.GraphModule, position: int) -> str:
    """Which part of which argument an input is, in brackets; "" where it is an argument as a whole."""
    paths = [(name, *path) for name, spec in _by_argument(module) for path in trees.leaf_paths(spec)]
    return f" ({' '.join(paths[position])})" if len(paths[position]) > 1 else ""


def _arranged(module: fx.GraphModule, name: str, spec: pytree.TreeSpec, value: Any) -> Any:
    """One argument in the containers that the graph takes."""
    if spec.is_leaf() and isinstance(value, Tensor | bool | int | float | str | None):
        return value
    if _structure(value) == spec:
        return value
    leaves = _leaves(module, name, spec, value)
    return pytree.tree_unflatten(leaves, spec)


def _structure(value: Any) -> pytree.TreeSpec | None:
    """How a value is made; None where what it is registered with refuses it."""
    try:
        return pytree.tree_structure(value)
    except Exception:  # of a registered class: any type
        return None


def _leaves(module: fx.GraphModule, where: str, spec: pytree.TreeSpec, value: Any) -> list[Any]:
    """The leaves of a value, in the order of the graph's."""
    if spec.is_leaf():
        made = _structure(value)
        if made is None or not made.is_leaf():
            raise _differs(where, f"is a {type(value).__name__}, and the graph was captured for one tensor or constant")
        return [value]
    if not trees.holds_anything(spec.type):
        return _leaves_of_class(where, spec, value)
    template = pytree.SUPPORTED_NODES[spec.type].unflatten_fn(list(range(spec.num_children)), spec.context)
    if isinstance(template, Mapping) and isinstance(value, Mapping):
        if set(value) != set(template):
            keys = f"{_show(list(value))}, and the graph was captured for {_show(list(template))}"
            raise _differs(where, f"has the keys {keys}")
        children = [value[key] for key in template]
    elif isinstance(template, list | tuple | deque) and isinstance(value, list | tuple | deque):
        if len(value) != len(template):
            raise _differs(where, f"holds {len(value)}, and the graph was captured for {len(template)}")
        children = list(value)
    else:
        return _leaves_of_cache(module, where, spec, value)
    steps = trees.steps_of(spec, len(children))
    return [
        leaf
        for step, inner, child in zip(steps, spec.children(), children, strict=True)
        for leaf in _leaves(module, f"{where} {step}", inner, child)
    ]


def _leaves_of_class(where: str, spec: pytree.TreeSpec, value: Any) -> list[Any]:
    """The leaves of an object of a registered class, which has to be just as the example was, but for its tensors."""
    kind = spec.type.__name__
    if type(value) is not spec.type:
        raise _differs(where, f"is a {type(value).__name__}, and the graph was captured for a {kind}", "give it one")
    leaves, made = _flatten(where, value)
    if made == spec:
        return leaves
    if len(leaves) != spec.num_leaves:
        raise _differs(where, f"holds {len(leaves)}, and the graph was captured for {_count(spec, leaves)}")
    raise _differs(where, f"is a {kind} {_difference(spec.context, made.context)}")


def _leaves_of_cache(module: fx.GraphModule, where: str, spec: pytree.TreeSpec, value: Any) -> list[Any]:
    """The leaves of a cache where the graph takes plain containers, as those from files do."""
    kind, plain = type(value).__name__, _encoded(spec)
    if not register_caches(module, [value]) or type(value) not in pytree.SUPPORTED_NODES:
        raise _differs(where, f"is a {kind}, and the graph takes {_words(plain)}", "give it that")
    if reason := untold(value, given=True):
        raise _differs(where, f"is {reason}, and the graph has that of its example", "give it to the model itself")
    leaves, made = _flatten(where, value)
    if _encoded(made) == plain:
        return leaves
    what = f"is a {kind} that holds {len(leaves)}, and the graph was captured for {_count(spec, leaves)}"
    if len(leaves) == spec.num_leaves:
        what = f"is a {kind} that is taken apart into {_words(_encoded(made))}, and the graph takes {_words(plain)}"
    raise _differs(where, what)


def _flatten(where: str, value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves and the structure of an object of a registered class."""
    try:
        return pytree.tree_flatten(value)
    except Exception as error:  # of a registered class: any type
        raise _differs(
            where, f"is a {type(value).__name__} that cannot be taken apart ({type(error).__name__}: {error})"
        ) from error


def _encoded(spec: pytree.TreeSpec) -> Any:
    """The plain containers that stand for a tree in a file; None where there are none."""
    try:
        return encode_tree(spec)
    except ValueError:
        return None


def _words(tree: Any) -> str:
    """Plain containers, as a file writes them, in words."""
    if isinstance(tree, dict) and "dict" in tree:
        return f"a dict with the keys {_show(list(tree['dict']))}"
    items = tree.get("tuple") if isinstance(tree, dict) else tree
    return f"a {'tuple' if isinstance(tree, dict) else 'list'} of {len(items)}" if items else "other containers"


def _count(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> str:
    return f"{spec.num_leaves}{' (an empty cache holds none)' if len(leaves) < spec.num_leaves else ''}"


def _difference(wanted: Any, given: Any, name: str = "") -> str:
    """What of a registered class is not in its tensors and is another than in the example, in words."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(wanted, dict) and isinstance(given, dict) and set(wanted) == set(given):
        pairs = [(str(key), old, given[key]) for key, old in wanted.items()]
    elif isinstance(wanted, list) and isinstance(given, list) and len(wanted) == len(given):
        pairs = [("", old, new) for old, new in zip(wanted, given, strict=True)]
    for step, old, new in pairs:
        if old != new:  # transformers writes its own marks as single letters
            return _difference(old, new, step if len(step) > 1 else name)
    said = f"{name} " if name else ""
    return f"made with {said}{_show(given)}, and the graph was captured for one with {said}{_show(wanted)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _differs(where: str, what: str, remedy: str = _AGAIN) -> LoweringError:
    return LoweringError(f"these are not the arguments of the lowered module: {where} {what}: {remedy}")
