"""How a torch.fx graph uses its weights.

Owns the data flow from a ``get_attr`` node to the contraction that reads it; it must not know which module the graph
came from, nor what will be done to the weight. Function and method graphs and ATen graphs are read alike.

Rules:
    1. A parameter that a contraction (:mod:`srigl_fx.passes.sites.contractions`) reads as its weight, whole or through
       transposes, reshapes, slices, selections, casts and concatenations, is a contraction weight; what the contraction
       does with each dimension decides which of the parameter's axes are neurons and which are inputs.
    2. Scaling element by element keeps zeros where they are, so it counts as reading the weight, unless the scale is
       computed from the weight itself.
    3. One that reaches a weight operand through any other operation is *transformed*: masking the stored values is not
       masking what the contraction reads.
    4. One that a lookup (``embedding``) reads is a table.
    5. One that only meets a contraction as data, or meets none, is no weight.

A value is one of three things on its way through the graph: ``Views``, which hold elements of parameters as they are;
``Derived``, which is computed from parameters; ``Data``, which no parameter went into but through a contraction.

    ==================================  ===================================================================
    view, copy, concatenation of Views  Views
    Views times Data or a constant      Views (rule 2)
    anything else with Views            Derived
    contraction                         Data, and a use of every parameter that went into it (rules 1, 3, 5)
    lookup                              Data, and a use (rule 4)
    ==================================  ===================================================================
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from srigl_fx.passes.operators import operator_named
from srigl_fx.passes.sites.contractions import LOOKUPS, OPAQUE, Operand, name_of, operands
from srigl_fx.passes.sites.weight_layout import LOOKED_UP, Layout, layout_of
from srigl_fx.passes.sites.weight_views import WeightView, is_view

_TURNED = frozenset({"flip", "fliplr", "flipud", "neg", "negative", "positive"})  # neurons stay what they are


def is_copy(name: str) -> bool:
    """Whether an operation gives back a weight as it is, up to type, sign and the order of its neurons.

    Example:
        >>> is_copy("half"), is_copy("__neg__"), is_copy("dropout")
        (True, True, False)
    """
    row = operator_named(name)
    return (row.does == "copies" and row.family != "dropout") or name.strip("_") in _TURNED


UseKind = Literal["weight", "transformed", "lookup", "unsupported", "none"]


@dataclass(frozen=True, kw_only=True)
class ParameterUse:
    """One way a parameter is used.

    Attributes:
        kind: What sort of use it is, by the rules above.
        node: The node that reads it, where it was a graph's.
        layout: For a weight, how its neurons lie.
        detail: A few words for the report.
    """

    kind: UseKind
    node: fx.Node | None = None
    layout: Layout | None = None
    detail: str = ""


@dataclass(frozen=True)
class Views:
    """A value that holds elements of parameters as they are: several, where they were concatenated."""

    views: tuple[WeightView, ...]

    @property
    def sources(self) -> frozenset[int]:
        """The ids of the parameters."""
        return frozenset(view.parameter for view in self.views)


@dataclass(frozen=True)
class Derived:
    """A value computed from parameters; ``alone`` if from parameters and constants only."""

    sources: frozenset[int]
    alone: bool
    rank: int | None = None


@dataclass(frozen=True)
class Data:
    """A value that no weight went into, other than through a contraction; its number of dimensions where known."""

    rank: int | None = None


Value = Views | Derived | Data
Report = Callable[[int, ParameterUse], None]


def uses_in(graph: fx.Graph, attribute: Callable[[str], object]) -> dict[int, list[ParameterUse]]:
    """Every use of the parameters of two or more dimensions that a graph makes, by the Parameter's id.

    Args:
        graph: A graph of torch functions, methods, ATen operators and child modules.
        attribute: What a ``get_attr`` target is.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 6)
        >>> (uses,) = uses_in(fx.Tracer().trace(layer), lambda name: getattr(layer, name)).values()
        >>> uses[0].kind, uses[0].layout.neuron_axes
        ('weight', (0,))
    """
    found: dict[int, list[ParameterUse]] = {}
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:

        def report(source: int, use: ParameterUse, node: fx.Node = node) -> None:
            found.setdefault(source, []).append(replace(use, node=node))

        if node.op == "get_attr":
            values[node] = initial(attribute(node.target))
            continue
        inputs = [values[each] for each in node.all_input_nodes]
        if not any(isinstance(each, Views | Derived | list) for each in inputs):  # a list: parts of a weight, split
            values[node] = Data()
        elif node.op in ("call_function", "call_method"):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _called(node.target, args, kwargs, report)
        else:  # a child is handed it, or it is returned: rule 5, as far as this graph shows
            for source in frozenset().union(*(value.sources for value in _tracked(inputs))):
                report(source, ParameterUse(kind="none"))
            values[node] = Data()
    return found


def initial(value: object) -> Value:
    """What a graph's or a model's own tensor is at first."""
    if isinstance(value, nn.Parameter) and value.dim() >= 2 and value.numel() > 0:
        return Views((WeightView.whole(value),))
    return Derived(frozenset(), alone=True, rank=value.dim()) if isinstance(value, Tensor) else Data()


def _called(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> Any:
    name, function = name_of(target), target
    if target is getattr:
        name = args[1] if isinstance(args[1], str) else ""
        if not is_view(name) and name != "data":
            return Data()  # a shape, a dtype
        args = args[:1]
        function = _property(name)
    elif target is operator.getitem and isinstance(args[0], list):
        picked = args[0][args[1]] if isinstance(args[1], int | slice) else None
        return Data() if picked is None else picked
    elif isinstance(target, str):
        function = _method(target)
    return after(name, function, args, kwargs, report)


def _property(name: str) -> Callable[[Tensor], Any]:
    return lambda tensor: getattr(tensor, name)


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def after(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], report: Report) -> Any:
    """Follow the weights through one operation; what it does with them goes to ``report``.

    Args:
        name: The operation's plain name.
        function: What to call to see what a view does to a tensor's dimensions.
        args: Its arguments, each tensor among them a :class:`Views`, a :class:`Derived` or a :class:`Data`.
        kwargs: Its keyword arguments, likewise.
        report: Told of every use of a parameter.

    Returns:
        What the result is: a value, or a list of them.
    """
    flat = list(_flatten((*args, *kwargs.values())))
    met = _tracked(flat)
    sources: frozenset[int] = frozenset().union(*(value.sources for value in met))
    if (found := operands(name, args, kwargs)) is not None:  # rules 1, 3 and 5
        return _contract(name, found, sources, report)
    if name in LOOKUPS or name in OPAQUE:  # rule 4, or a contraction of another kind
        kind: UseKind = "lookup" if name in LOOKUPS else "none"
        for source in sources:
            report(source, ParameterUse(kind=kind, detail=OPAQUE.get(name, "")))
        return Data()
    first = args[0] if args else None
    if isinstance(first, Views):  # rule 1
        if is_copy(name):
            return first
        if name == "index_select" and len(args) > 1 and isinstance(args[1], int):
            return _views([view.indexed(args[1] % len(view.dims), rank=1) for view in first.views], first)
        if is_view(name):
            return _viewed(first, function, name, args[1:], kwargs)
    derived = Derived(
        sources, alone=not any(isinstance(v, Data) or (isinstance(v, Derived) and not v.alone) for v in flat)
    )
    if operator_named(name).family == "multiply":  # rule 2
        return _scaled(name, args) or derived
    if name in ("cat", "concat", "concatenate", "stack"):  # rule 1
        return _joined(name, args, kwargs) or derived
    return derived


def _contract(name: str, found: list[Operand], sources: frozenset[int], report: Report) -> Value:
    values = [operand.value for operand in found if operand.value is not None]
    # Rule 3, of two weights: of W2 (W1 x), each is masked where it stands, but (W2 W1) x reads neither of them.
    if all(operand.either for operand in found) and all(_is_weight(value) for value in values) and len(values) > 1:
        for source in sources:
            detail = "it is multiplied with another parameter before any data is"
            report(source, ParameterUse(kind="transformed", detail=detail))
        return Derived(sources, alone=True)
    read: set[int] = set()
    for operand in found:
        value = operand.value
        if isinstance(value, Views):  # rule 1
            for view in value.views:
                report(view.parameter, _as_use(layout_of(view, operand)))
        # Rule 3. What data went into too is a weight only where nothing else could be: else it is an activation.
        elif isinstance(value, Derived) and (value.alone or not operand.either):
            for source in value.sources:
                report(
                    source, ParameterUse(kind="transformed", detail=f"the weight is transformed before {name} reads it")
                )
        else:
            continue
        read |= value.sources
    for source in sources - read:  # rule 5
        report(source, ParameterUse(kind="none"))
    return Data()


def _as_use(layout: Layout | str) -> ParameterUse:
    if isinstance(layout, Layout):
        return ParameterUse(kind="weight", layout=layout)
    return ParameterUse(kind="none" if layout == LOOKED_UP else "unsupported", detail=layout)


def _is_weight(value: object) -> bool:
    return isinstance(value, Views) or (isinstance(value, Derived) and value.alone and bool(value.sources))


def _tracked(values: Iterable[Any]) -> list[Views | Derived]:
    return [value for value in _flatten(list(values)) if isinstance(value, Views | Derived)]


def _viewed(value: Views, function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if name in ("getitem", "__getitem__"):  # indices may be tensors, which strides do not tell of
        return _indexed(value, args[0])
    if any(isinstance(each, Views | Derived | Data) for each in _flatten((*args, *kwargs.values()))):
        return Derived(value.sources, alone=True)  # its sizes are only known at run time
    results = [view.through(function, *args, **kwargs) for view in value.views]
    if any(result is None for result in results):
        return Derived(value.sources, alone=True)
    if isinstance(results[0], list):
        return [_views(parts, value) for parts in zip(*results, strict=False)]
    return _views(results, value)


def _views(views: Sequence[WeightView | None], value: Views) -> Value:
    known = tuple(view for view in views if view is not None)
    return Views(known) if len(known) == len(views) else Derived(value.sources, alone=True)


def _indexed(value: Views, index: Any) -> Value:
    parts = list(index) if isinstance(index, tuple) else [index]
    views = [_indexed_view(view, parts) for view in value.views]
    return _views(views, value)


def _indexed_view(view: WeightView, parts: list[Any]) -> WeightView | None:
    by_tensor = [i for i, part in enumerate(parts) if isinstance(part, Tensor | Data | Derived | Views | list)]
    if not by_tensor:
        found = view.through(_get, tuple(parts))
        return found if isinstance(found, WeightView) else None
    position = by_tensor[0]
    # Indices that are paired up, or stand behind others, may move the dimensions of the result to its front.
    if len(by_tensor) > 1 or any(not isinstance(part, slice) for part in parts[:position]):
        return None
    index = parts[position]
    rank = 1 if isinstance(index, list) else None
    if isinstance(index, Data | Derived | Tensor):
        rank = index.dim() if isinstance(index, Tensor) else index.rank
    indexed = view.indexed(position, rank=rank)
    whole = all(isinstance(part, slice) and part == slice(None) for i, part in enumerate(parts) if i != position)
    return indexed if whole else None


def _get(tensor: Tensor, index: Any) -> Tensor:
    return tensor[index]


def _scaled(name: str, args: Sequence[Any]) -> Value | None:
    """The weight, if this is one scaled by a number or by a tensor that is not made from a weight."""
    if len(args) < 2:
        return None
    value, scale = args[0], args[1]
    if "div" in name and not isinstance(value, Views):  # divided by the weight: zeros do not stay zeros
        return None
    if not isinstance(value, Views):
        value, scale = scale, value
    if not isinstance(value, Views):
        return None
    if isinstance(scale, Views) or (isinstance(scale, Derived) and scale.sources):  # rule 2: it may be w / |w|
        return None
    return value


def _joined(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Value | None:
    """Weights side by side: each keeps its dimensions, whatever the others are."""
    parts = args[0] if args else kwargs.get("tensors")
    if not isinstance(parts, tuple | list) or not all(isinstance(part, Views) for part in parts):
        return None
    views = [view for part in parts for view in part.views]
    if name == "stack":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not isinstance(dim, int):
            return None
        views = [view.through(_unsqueezed, dim) for view in views]
    return Views(tuple(views)) if all(isinstance(view, WeightView) for view in views) else None


def _unsqueezed(tensor: Tensor, dim: int) -> Tensor:
    return tensor.unsqueeze(dim)


def _flatten(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, slice):
        yield from (value.start or 0, value.stop or 0, value.step or 1)
    else:
        yield value
