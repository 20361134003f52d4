"""How values flow through a whole model: its modules' own forwards, joined into one graph.

Owns the joining, and the few sorts of operation that the flow of neurons depends on; it must not know what the graph
is read for. Nothing is run: forwards are the traces of discovery (:mod:`srigl_fx.passes.sites.local_trace`).

Rules:
    1. A called module is joined in by its trace, with the caller's values for its inputs; of several ways through a
       forward the first complete one that takes all values given. A module called twice is there twice.
    2. A module of a registered type (:mod:`srigl_fx.passes.sites.registry`) is one operation.
    3. What a forward returns is taken apart by index, key or attribute. Where a trace stopped before its end, an
       ``unknown`` reader gets its values, and what it returns is a contraction of them without a weight.
    4. What is computed from parameters, sizes and constants alone is no data: it has no node.
    5. A module that was not met with data on the way from the model's inputs is a beginning of its own: its inputs are
       ``input`` values, and what it returns goes to an ``unknown`` reader. So is another way through a module, if it
       meets modules that were not met.
    6. Any operation that is not known to mix neurons keeps them apart: ``elementwise``, whatever it does to positions.
       What it makes of one value alone is that value.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from srigl_fx.passes.operators import operator_named
from srigl_fx.passes.sites.contractions import LOOKUPS, OPAQUE, name_of, operands
from srigl_fx.passes.sites.local_trace import Trace
from srigl_fx.passes.sites.registry import lookup

Sort = Literal["input", "contraction", "product", "sum", "norm", "length", "elementwise", "unknown"]

_MEANS = frozenset(("sum", "mean"))
_ATTENTIONS = frozenset(("scaled_dot_product_attention", "flex_attention"))
_NEURONS_APART = frozenset({"batch norm", "instance norm"})  # of the norms, those of each neuron on its own
_NORM_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_CHANNEL_NORMS = (nn.modules.batchnorm._NormBase,)  # each neuron is normalised on its own
_MOST_VALUES = 20_000

Ways = Callable[[nn.Module], Iterable[Trace]]


@dataclass(eq=False)
class Value:
    """One value of data.

    Attributes:
        sort: What made it: a model's input; a contraction with weights; a product of data with data, such as attention;
            a sum of two data; a normalisation over neurons; a length, which is one number for all values on the last
            axis; anything else, which keeps neurons apart; or what stands for readers that nobody saw.
        inputs: The data it was made from.
        weights: Ids of the parameters that a contraction read.
        place: Its place in :attr:`Flow.values`.
        users: The values made from it.
    """

    sort: Sort
    inputs: tuple["Value", ...]
    weights: frozenset[int] = frozenset()
    place: int = 0
    users: list["Value"] = field(default_factory=list)


@dataclass(frozen=True)
class _Weights:
    """Computed from parameters and constants alone."""

    ids: frozenset[int]


class TooLargeError(Exception):
    """The joined graph has more values than anybody wants to look at."""


class Flow:
    """The joined graph.

    Attributes:
        values: All values; each stands behind those it was made from.
        stacks: Those that are several values side by side, of which a reduction makes their sum.
    """

    def __init__(self, model: nn.Module, ways: Ways) -> None:
        """Join the forwards of ``model`` and those below; ``ways`` gives the traces of a module.

        Raises:
            TooLargeError: The graph would be too large.
        """
        self.values: list[Value] = []
        self.stacks: set[Value] = set()
        self._ways = ways
        self._met: set[int] = set()
        self._called(model, (), {}, root=True)
        # Rule 5.
        for module in model.modules():
            if self._is_new(module):
                self._make("unknown", _data(self._called(module, (), {}, root=True)))
            if any(map(self._is_new, module.modules())):
                self._other_ways(module)

    def _is_new(self, module: nn.Module) -> bool:
        """Whether a module that has a forward was not met yet."""
        own = None if isinstance(module, ScriptModule) else getattr(type(module), "forward", None)
        return id(module) not in self._met and own not in (None, nn.Module.forward)

    def _other_ways(self, module: nn.Module) -> None:
        """Join in the ways through a module on which children are called that were met on none before."""
        if isinstance(module, fx.GraphModule | nn.Sequential) or _sort_of(module) is not None:
            return
        for trace in self._ways(module):
            called = {str(node.target) for node in trace.graph.find_nodes(op="call_module")}
            if not trace.failure and any(id(module.get_submodule(name)) not in self._met for name in called):
                self._make("unknown", _data(_Frame(self, module, trace, (), {}, root=True).run()))

    def _make(self, sort: Sort, inputs: Iterable[Value], weights: frozenset[int] = frozenset()) -> Value:
        given = tuple(dict.fromkeys(inputs))
        if sort == "elementwise" and len(given) == 1:  # rule 6
            return given[0]
        if len(self.values) >= _MOST_VALUES:
            raise TooLargeError
        made = Value(sort, given, weights, len(self.values))
        for each in made.inputs:
            each.users.append(made)
        self.values.append(made)
        return made

    def _called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, root: bool = False
    ) -> Any:
        """What a module returns."""
        data = list(_data((args, kwargs)))
        if not data and not root:  # rule 4: a child that computes something from its parameters alone
            return _Weights(frozenset(map(id, module.parameters())) | _ids((args, kwargs)))
        self._met.add(id(module))
        if root and not isinstance(module, fx.GraphModule) and _sort_of(module) is not None:
            data = [self._make("input", ())]
        if isinstance(module, nn.MultiheadAttention) and lookup(module) is not None:  # rule 2, in three values
            return self._attention(module, data)
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not root:
            # Rule 1, without a trace: torch.fx would only find the same children in the same order.
            value = args[0] if args else next(iter(kwargs.values()))
            for child in module:
                value = self._called(child, (value,), {})
            return value
        if (sort := _sort_of(module)) is not None:  # rule 2
            weights = frozenset(map(id, module.parameters())) if sort == "contraction" else frozenset[int]()
            return self._make(sort, data, weights)
        trace = self._trace(module, args, kwargs)  # rule 1
        if trace is None:  # nobody knows what it does: nothing is followed through it
            return self._make("contraction", data)
        return _Frame(self, module, trace, args, kwargs, root=root).run()

    def _attention(self, module: nn.MultiheadAttention, data: list[Value]) -> tuple[Value, Value]:
        packed = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        factors = self._make("contraction", data, frozenset(id(weight) for weight in packed if weight is not None))
        mixed = self._make("product", (factors,))
        return self._make("contraction", (mixed,), frozenset(map(id, module.out_proj.parameters()))), mixed

    def _trace(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace | None:
        if isinstance(module, fx.GraphModule):
            return Trace(module.graph, "", {})
        if isinstance(module, ScriptModule):
            return None
        given = {name for name, value in _bound(module, args, kwargs).items() if any(_data(value))}
        longest: Trace | None = None
        complete: Trace | None = None
        for trace in self._ways(module):
            # Rule 1; where none takes all values, the first complete one, and then the one that came furthest.
            if not trace.failure:
                complete = complete or trace
                if given <= {str(node.target).lstrip("*") for node in trace.graph.find_nodes(op="placeholder")}:
                    return trace
            if longest is None or len(trace.graph.nodes) > len(longest.graph.nodes):
                longest = trace
        found = complete or longest
        return found if found is not None and len(found.graph.nodes) else None


class _Frame:
    """One call of a traced forward."""

    def __init__(
        self,
        flow: Flow,
        module: nn.Module,
        trace: Trace,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        root: bool,
    ) -> None:
        self.flow, self.module, self.trace, self.root = flow, module, trace, root
        self.bound = _bound(module, args, kwargs)
        self.known: dict[fx.Node, Any] = {}

    def run(self) -> Any:
        for node in self.trace.graph.nodes:
            if node.op == "output":
                return self._of(node.args[0])
            self.known[node] = self._value(node)
        return self._cut_off()

    def _cut_off(self) -> Value | None:
        """Rule 3: what stands for the output of a trace that stopped early: anything may have become of its values."""
        made = list(_data(list(self.known.values())))
        if not made:
            return None
        self.flow._make("unknown", made)
        return self.flow._make("contraction", made)

    def _of(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self.known.__getitem__)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if self.root:
                return self.flow._make("input", ()) if node.users else None
            # Of an argument that the trace has left out, torch.fx numbers the name; nothing reads it. One that is read
            # and was not given must be data: no way through the forward fits the call better.
            given = self.bound.get(str(node.target).lstrip("*"))
            missing = given is None and node.users and not str(node.target).startswith("*")
            return self.flow._make("input", ()) if missing else given
        if node.op == "get_attr":
            found = self.trace.constants.get(str(node.target), _resolve(self.module, str(node.target)))
            return _Weights(frozenset([id(found)])) if isinstance(found, Tensor) else None
        args, kwargs = self._of((node.args, node.kwargs))
        if node.op == "call_module":
            return self.flow._called(self.module.get_submodule(str(node.target)), args, kwargs)
        made = self._operation(node.target, args, kwargs)
        self._written(node, made)
        return made

    def _operation(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a function or a method of tensors returns."""
        if target is getattr or target is operator.getitem:  # rule 3
            return self._part(target, args)
        name = name_of(target)
        row = operator_named(name)
        if row.does == "measures":  # rule 4
            return None
        data = list(_data((args, kwargs)))
        if not data:  # rule 4
            return _Weights(_ids((args, kwargs)))
        make = self.flow._make
        if (found := operands(name, args, kwargs)) is not None:
            read = [operand.value for operand in found if operand.value is not None]
            weights = frozenset().union(*(each.ids for each in read if isinstance(each, _Weights)))
            # The same operation contracts with a weight, or data with data, as attention does that is written out.
            return make("contraction", data, weights) if weights else make("product", data)
        if name in LOOKUPS or name in OPAQUE:
            return make("contraction", data, _ids((args, kwargs)))
        if name == "" and (weights := _ids((args, kwargs))):  # such as the attention of torchvision's Swin
            return make("contraction", data, weights)
        if name in _ATTENTIONS or (name == "" and "attention" in getattr(target, "__name__", "")):
            return make("product", data)
        if row.does == "normalises" and row.family not in _NEURONS_APART:
            return make("norm", data)
        summed = list(_data(args[:2]))
        if row.family == "add" and len(summed) == 2:
            return make("sum", data)
        if row.family == "between" and len(summed) == 2:  # a sum of two, weighted by a third
            return make("elementwise", [make("sum", summed), *data[2:]])
        if row.family == "scaled add" and isinstance(args[0], Value) and len(data) > 1:
            return make("sum", [args[0], make("elementwise", data[1:])])
        if name in _MEANS and data[0] in self.flow.stacks:  # torch.stack(branches).sum(0)
            return functools.reduce(lambda left, right: make("sum", [left, right]), data[0].inputs)
        # Norms that are written out: a length of the last axis, and then the product of a value with its own length.
        if (name in _MEANS or row.family == "spread") and len(data) == 1 and _keeps_last_axis_as_one(args, kwargs):
            return make("length", data)
        if row.family == "multiply" and len(summed) == 2 and _is_scaled_by_its_length(*summed):
            return make("norm", data)
        made = make("elementwise", data)  # rule 6
        if name == "stack" and len(made.inputs) > 1:
            self.flow.stacks.add(made)
        return made

    def _part(self, target: Any, args: Any) -> Any:
        whole, key = args[0], args[1]
        if target is getattr:
            if isinstance(whole, Mapping):
                return whole.get(key)
            return None if operator_named(key).does == "measures" else whole
        if isinstance(whole, tuple | list):
            return whole[key] if isinstance(key, int | slice) and _fits(whole, key) else list(whole)
        if isinstance(whole, Mapping):
            return whole.get(key, list(whole.values())[key] if isinstance(key, int) and _fits(whole, key) else None)
        if isinstance(whole, Value):
            return self.flow._make("elementwise", [whole, *_data(key)])
        return whole

    def _written(self, node: fx.Node, made: Any) -> None:
        """What a call wrote to is what it returns."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
        first = node.args[0] if node.args else None
        if in_place and isinstance(first, fx.Node) and isinstance(made, Value):
            self.known[first] = made


def _keeps_last_axis_as_one(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a reduction with these arguments is over the last axis, and leaves it there with size one."""
    dim = kwargs.get("dim", next((each for each in args[1:] if isinstance(each, int | tuple | list)), None))
    over_last = dim == -1 or (isinstance(dim, tuple | list) and [*dim] == [-1])
    return over_last and (kwargs.get("keepdim") is True or (bool(args[2:]) and args[-1] is True))


def _is_scaled_by_its_length(one: Value, other: Value) -> bool:
    """Whether one of two factors is a length of the other: a normalisation that is written out."""
    return any(length.sort == "length" and whole in length.inputs for length, whole in ((one, other), (other, one)))


def _sort_of(module: nn.Module) -> Sort | None:
    """What a module does that is one operation; None where its forward must be looked at."""
    facts = lookup(module)
    # Experts are mixed by a router in their forward: that is looked at.
    if facts is not None and any(fact.kind == "stack" for fact in facts.values()):
        return None
    if facts is not None and not isinstance(module, nn.LayerNorm):
        return "contraction"
    if isinstance(module, _CHANNEL_NORMS):
        return "elementwise"
    if isinstance(module, _NORM_MODULES):
        return "norm"
    own = [*module.parameters()]
    # Norms of other libraries, by their names; those with a matrix compute their scale, and are looked at.
    if "norm" in type(module).__name__.lower() and all(parameter.dim() <= 1 for parameter in own):
        return "elementwise" if "batch" in type(module).__name__.lower() else "norm"
    if type(module).__module__.startswith("torch.nn.") and not own and not any(module.children()):
        return "elementwise"
    return None


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module's forward is given, by the name of the parameter."""
    try:
        signature = inspect.signature(inspect.unwrap(type(module).forward))
        return dict(signature.bind_partial(module, *args, **kwargs).arguments)
    except (TypeError, ValueError):  # a forward without a signature, or arguments that do not fit
        return {**{str(position): value for position, value in enumerate(args)}, **kwargs}


def _data(value: Any) -> Iterator[Value]:
    """The values of data inside tuples, lists, dicts and slices."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _data(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _data(each)
    elif isinstance(value, slice):
        yield from _data((value.start, value.stop, value.step))


def _ids(value: Any) -> frozenset[int]:
    """The parameters behind what was computed from parameters alone."""
    if isinstance(value, _Weights):
        return value.ids
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return frozenset().union(*map(_ids, value)) if isinstance(value, tuple | list) else frozenset()


def _fits(whole: Any, key: int | slice) -> bool:
    return isinstance(key, slice) or -len(whole) <= key < len(whole)


def _resolve(root: nn.Module, target: str) -> object:
    value: object = root
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
