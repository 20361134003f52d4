"""The torch.fx graphs of one module's own forward, made only to be looked at.

Owns the tracer of discovery; it must not know what is read from its graphs. Nothing is run: inputs are symbols, and
children are leaves, unless they are handed one of the module's own weights. Where the forward's way depends on data or
on optional arguments, there is a trace for each of a few ways; a loop over data goes round once. What the code writes
to the module meanwhile is undone.

1. Children are leaves, so that each module's forward is traced on its own; but one that is handed a weight of the
   traced module is looked into, since the weight is used there. Children of torch.nn say by their type what they do.
2. A condition on data has the same answer throughout a way: false first, which is how optional branches are left out
   most often, then true. Ways with both answers would be as many as two to the power of the conditions.
3. Optional arguments are left out, or given as symbols. Where all are optional, the first is taken for the input.
4. A loop over data goes round once, over the first element; a symbol is 1 where Python insists on a number.
5. A trace that an error stopped is kept as far as it came, with the error.
6. What the forward writes to the module meanwhile is undone, what it logs or warns of kept back: it has seen symbols.
"""

import functools
import inspect
import logging
import operator
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from srigl_fx.nn.model_state import restored
from srigl_fx.passes.sites.contractions import name_of
from srigl_fx.passes.sites.weight_uses import is_copy
from srigl_fx.passes.sites.weight_views import is_view

log = logging.getLogger(__name__)

_MAX_CONDITIONS = 200  # more of them, all true, are a loop without end
_TRANSPARENT = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Trace:
    """One way through a forward, and what stopped the tracer on it ("" for nothing).

    A graph that the tracer could not finish shows what is so, only not everything. ``constants`` are the tensors that
    the forward made on the way, by the names the graph has for them.
    """

    graph: fx.Graph
    failure: str
    constants: dict[str, Tensor]


def traces_of(module: nn.Module) -> Iterator[Trace]:
    """The ways through the module's own forward, the most usual one first; the next is only traced when asked for.

    Optional arguments are left out first, all but the first where there are no others, and then given; conditions on
    data are false first and then true.

    Example:
        >>> [trace.failure for trace in traces_of(nn.Linear(2, 2))]
        ['']
    """
    for left_out in _left_out(module):  # rule 3
        for answer in (False, True):  # rule 2
            tracer = _Tracer(module, answer)
            failure = ""
            with _restored(module), _silent():
                try:
                    tracer.trace(module, left_out)
                except Exception as error:  # rule 5: user code under the tracer may raise anything
                    failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    log.debug("tracing %s failed", type(module).__name__, exc_info=True)
            constants = {name: tensor for tensor, name in getattr(tracer, "tensor_attrs", {}).items()}
            yield Trace(getattr(tracer, "graph", None) or fx.Graph(), failure, constants)
            if not tracer.conditions:  # the other answer would make the same graph
                break


def _left_out(module: nn.Module) -> list[dict[str, Any] | None]:
    """For each way to call the module's forward, the optional arguments that it leaves out, with their values."""
    try:
        parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    except (TypeError, ValueError):  # a forward that is no function
        return [None]
    plain = (bool, int, float, str, type(None))
    defaults = {name: p.default for name, p in parameters.items() if isinstance(p.default, plain)}
    named = [p for p in list(parameters.values())[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    ways: list[dict[str, Any] | None] = [defaults, None] if defaults else [None]
    # Rule 3; the others keep their defaults, which torch.fx puts in as constants.
    if len(named) > 1 and all(p.name in defaults for p in named):
        ways.insert(0, {name: value for name, value in defaults.items() if name != named[0].name})
    return ways


def _outside(*args: Any, **kwargs: Any) -> None:
    """Stands in graphs for a module that is no part of the model, such as a loss made on the spot."""


class _Tracer(fx.Tracer):
    """Follows one way through a forward: every condition on data has the same answer."""

    def __init__(self, module: nn.Module, answer: bool) -> None:
        modules: Any = ()  # functions of math take symbols for numbers
        super().__init__(autowrap_modules=modules, param_shapes_constant=True)
        self.answer = answer
        self.conditions = 0
        self.weights: dict[fx.Node, bool] = {}
        weight = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
        self.weight_dtype, self.weight_device = weight.dtype, weight.device

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol that can also stand for a number or a length."""
        return _Symbol(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Symbols for the inputs of the forward below its decorators: those take whatever they are given."""
        fn, args = super().create_args_for_root(inspect.unwrap(root_fn), is_module, concrete_args)
        return fn, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child that is not handed a weight."""
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A node, or for a child that is handed a weight the nodes of its forward."""
        # Rule 1.
        own_code = not type(m).__module__.startswith("torch.nn.") or isinstance(m, _TRANSPARENT)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)]
        if own_code and any(self._is_weight(value.node) for value in given):
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except NameError:  # not a child
            return self.create_proxy("call_function", _outside, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer of this way to a condition on data."""
        self.conditions += 1
        if self.conditions > _MAX_CONDITIONS:
            raise fx.proxy.TraceError("a loop on data has no end under the tracer")
        return self.answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """One round of a loop over data."""
        return iter((operator.getitem(cast(Any, obj), 0),))

    def keys(self, obj: fx.Proxy) -> Any:
        """No further keyword arguments."""
        return iter(())

    def _is_weight(self, node: fx.Node) -> bool:
        """Whether the node is one of the module's own weights, or a part of one."""
        if node not in self.weights:
            if node.op == "get_attr":
                path, _, attr = str(node.target).rpartition(".")
                parameter = self.root.get_submodule(path)._parameters.get(attr)  # a plain look-up gives a symbol
                self.weights[node] = parameter is not None and parameter.dim() >= 2
            else:
                name = str(node.args[1]) if node.target is getattr else name_of(node.target)
                first = node.args[0] if node.args else None
                part = is_view(name) or is_copy(name)
                self.weights[node] = part and isinstance(first, fx.Node) and self._is_weight(first)
        return self.weights[node]


class _Symbol(fx.Proxy):
    """Where Python insists on a number, it is 1: loops go round once.

    Its dtype and its device are those of the module's weights: functions that make tensors, and ``torch.finfo``, take
    no symbols for them.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device"):
            return getattr(cast(_Tracer, self.tracer), f"weight_{name}")
        return super().__getattr__(name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return 1

    def __index__(self) -> int:
        return 1

    def __int__(self) -> int:
        return 1

    def __float__(self) -> float:
        return 1.0


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Undo what the code writes to the module and those below it.

    That are attributes, buffers, caches in dicts and lists, and the attributes of plain objects among them: a
    classifier of Hugging Face, for one, writes to its configuration which kind of problem its labels are of.
    """
    modules = list(module.modules())
    held = {id(value): value for each in modules for value in each.__dict__.values() if _is_plain_object(value)}
    attributes = [(each.__dict__, each.__dict__.copy()) for each in (*modules, *held.values())]
    containers: list[tuple[Any, Any]] = [
        (value, value.copy()) for _, own in attributes for value in own.values() if type(value) in (dict, list, set)
    ]
    try:
        with restored(module, copied=False):  # the values too: what does not meet a symbol is computed
            yield
    finally:
        for value, before in (*attributes, *containers):
            if not _same(value, before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)


def _is_plain_object(value: Any) -> bool:
    """Whether it keeps attributes of its own, and is neither data nor code."""
    code = (type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (nn.Module, Tensor, *code))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep back what the code warns of or logs: nothing that it says of symbols concerns the user."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _same(value: Any, before: Any) -> bool:
    """Whether a container still holds the very same things."""
    if len(value) != len(before) or (isinstance(value, dict) and value.keys() != before.keys()):
        return False
    pairs = (
        zip(value.values(), before.values(), strict=True)
        if isinstance(value, dict)
        else zip(value, before, strict=True)
    )
    return all(one is other for one, other in pairs)
