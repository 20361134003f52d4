"""A lowered graph as a Python function that calls its condensed layers directly, for calls that nothing observes.

Owns that function's source, which inputs it takes, and when it may stand in for the graph's own. It must not know how
an operator is computed, nor what is wrong with other inputs. Most of what a call of a small layer takes is Python:
torch's dispatcher, the search for tensors through modules, and trees of inputs and outputs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from srigl_fx.lowering.inputs import sizes_of
from srigl_fx.passes.condensed_nodes import is_condensed
from srigl_fx.passes.program import arguments
from srigl_fx.passes.sizes import Size, is_within
from srigl_fx.runtime.cpu.direct import TENSORS, DirectCall

Described = Sequence[dict[str, Any] | None]


def unobserved() -> bool:
    """Whether operators are for nobody but who wants their results: nothing traces, transforms or profiles.

    Example:
        >>> unobserved()
        True
        >>> with torch.profiler.profile():
        ...     unobserved()
        False
    """
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


class DirectProgram:
    """A graph for direct calls.

    Attributes:
        described: What the module says of its inputs; a program is out of date where it says something else.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 4)), sparsity=0.5).eval()
        >>> lowered, x = sx.lower(model, (torch.ones(1, 8),), min_speedup=0), torch.ones(3, 8)
        >>> program = DirectProgram(lowered, lowered.inputs)
        >>> with torch.no_grad():
        ...     torch.equal(program(lowered, (x,), {})[0], lowered(x)), program(lowered, (x[:, 1:],), {})
        (True, None)
    """

    def __init__(self, module: fx.GraphModule, described: Described) -> None:
        info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
        positional, named = info.in_spec.children()
        self.described, self._names = described, tuple(info.orig_args)
        self._accepted = [_Accepted.of(one) for one in described]
        sizes = sizes_of(described)
        self._sums = [
            (i, axis, free)
            for i, axes in enumerate(sizes.axes)
            for axis, free in axes.items()
            if free.name is None and not self._accepted[i].anything
        ]
        self._limits = [(name, least, most) for name, (least, most) in sizes.limits.items()]
        self._conditions = sizes.conditions
        self._functions: _Functions | None = None
        flat = all(child.is_leaf() for spec in (positional, named) for child in spec.children())
        if flat and len(described) == len(self._names):
            self._functions = _functions(module, info.out_spec)

    def __call__(self, module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """What the module returns, in a tuple; None where its own function must be asked.

        That is so where arguments need a closer look, as they are not plainly those that the graph was captured for.
        """
        functions, accepted = self._functions, self._accepted
        if functions is None or len(args) + len(kwargs) != len(accepted):
            return None
        if kwargs:
            missing = self._names[len(args) :]
            if not all(name in kwargs for name in missing):
                return None
            args = (*args, *(kwargs[name] for name in missing))
        named: dict[str, int] = {}
        if not all(one.fits(value, named) for one, value in zip(accepted, args, strict=True)):
            return None
        if self._sums and not self._agree(args, named):
            return None
        if self._limits and not all(
            is_within(named.get(name, least), least, most) for name, least, most in self._limits
        ):
            return None
        if self._conditions and not all(
            one.holds(named) for one in self._conditions if all(name in named for name in one.names)
        ):
            return None
        try:
            tensors = functions.tensors(module)
        except (AttributeError, KeyError):  # they were put elsewhere since
            return None
        return (functions.run(tensors, *args),)

    def _agree(self, args: tuple[Any, ...], named: dict[str, int]) -> bool:
        """Whether sizes that are sums of others are so; one of a name that stands nowhere alone may be any."""
        return all(
            args[i].shape[axis] == free.at(named)
            for i, axis, free in self._sums
            if all(name in named for name, _ in free.terms)
        )


def direct_function(module: fx.GraphModule) -> Callable[..., Any]:
    """The function of a graph with plain inputs and outputs, for direct calls where its operators can be called so.

    The tensors of the module are those that it has now.

    Example:
        >>> module = fx.symbolic_trace(torch.nn.Linear(2, 1).requires_grad_(False))
        >>> torch.equal(direct_function(module)(torch.ones(1, 2)), module(torch.ones(1, 2)))
        True
    """
    functions = _functions(module, None)
    return module.forward if functions is None else functools.partial(functions.run, functions.tensors(module))


@dataclass(frozen=True, slots=True)
class _Accepted:
    """An input that is plainly as described: a tensor with these sizes, or a constant."""

    dtype: torch.dtype | None
    sizes: tuple[int | str | None, ...]
    value: object
    anything: bool = False

    @staticmethod
    def of(described: dict[str, Any] | None) -> "_Accepted":
        if described is None or described.get("any_rank"):
            return _Accepted(None, (), _NOTHING, anything=True)
        if "value" in described:
            return _Accepted(None, (), described["value"])
        dtype: torch.dtype = getattr(torch, described["dtype"])
        # A sum of others is compared when these are known.
        sizes = [size if not isinstance(size, str) or Size.parse(size).name else None for size in described["shape"]]
        return _Accepted(dtype, tuple(sizes), _NOTHING)

    def fits(self, given: Any, named: dict[str, int]) -> bool:
        """Whether it is so; ``named`` has the sizes with names, as far as they are known."""
        if self.dtype is None:
            return type(given) is type(self.value) and bool(given == self.value)
        if type(given) is not Tensor or given.dtype is not self.dtype:
            return False
        shape = given.shape
        if len(shape) != len(self.sizes):
            return False
        for size, wanted in zip(shape, self.sizes, strict=True):
            if wanted is None or size == wanted:
                continue
            if isinstance(wanted, int) or named.setdefault(wanted, size) != size:
                return False
        return True


_NOTHING = object()  # of which there is no other


@dataclass(frozen=True, slots=True)
class _Functions:
    """What was generated: finding the tensors of a module, and computing with them and the inputs."""

    tensors: Callable[[fx.GraphModule], tuple[Any, ...]]
    run: Callable[..., Any]


def _functions(module: fx.GraphModule, out_spec: pytree.TreeSpec | None) -> _Functions | None:
    """The functions of a graph; None where it calls modules, which may have hooks, or reads other attributes.

    Without ``out_spec`` the outputs are returned as the graph has them.
    """
    scope: dict[str, Any] = {}  # what the source refers to
    names: dict[fx.Node, str] = {}
    found: list[str] = []
    lines: list[str] = []
    inputs: list[str] = []
    for number, node in enumerate(module.graph.nodes):
        name = names[node] = f"v{number}"
        if node.op == "placeholder":
            inputs.append(name)
        elif node.op == "get_attr":
            place = _place(module, str(node.target))
            if place is None:
                return None
            found.append(place)
            lines.append(f"{name} = tensors[{len(found) - 1}]")
        elif node.op == "call_function":
            lines.append(f"{name} = {_call(node, names, scope)}")
        elif node.op == "call_method":
            owner, *rest = node.args
            lines.append(
                f"{name} = {_text(owner, names, scope)}.{node.target}({_listed(rest, node.kwargs, names, scope)})"
            )
        elif node.op == "output":
            lines.append(f"return {_returned(node.args[0], out_spec, names, scope)}")
        else:
            return None
        done = [names[one] for one in node.all_input_nodes if _last_user(one) is node]
        if done and node.op != "output":
            lines.append(f"del {', '.join(done)}")
        if node.op == "call_function" and not node.users:
            lines.append(f"del {name}")
    body = "\n    ".join(lines)
    source = (
        f"def tensors(module):\n    modules = module._modules\n    return ({''.join(f'{one}, ' for one in found)})\n"
        f"def run(tensors, {', '.join(inputs)}):\n    {body}\n"
    )
    exec(compile(source, "<a lowered graph, for direct calls>", "exec"), scope)
    return _Functions(scope["tensors"], scope["run"])


def _last_user(node: fx.Node) -> fx.Node | None:
    return max(node.users, default=None)


def _place(module: fx.GraphModule, target: str) -> str | None:
    """Where a tensor is, as source: through the dictionaries of modules, several times as fast as attributes."""
    *path, name = target.split(".")
    owner: torch.nn.Module = module
    where = "module"
    for step in path:
        inner = owner._modules.get(step)
        if inner is None:
            return None
        where += f"._modules[{step!r}]"
        owner = inner
    for store in ("_parameters", "_buffers", "_modules"):
        if name in getattr(owner, store):
            return f"{where}.{store}[{name!r}]".replace("module._modules", "modules", 1)
    return None


def _call(node: fx.Node, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    """A call of a function, as source."""
    if is_condensed(node):
        given = arguments(node)
        settings = {name: value for name, value in given.items() if name not in TENSORS}
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(settings)):
            direct = _kept(DirectCall(node.target, settings), scope)  # type: ignore[arg-type]
            return f"{direct}({', '.join(_text(given[name], names, scope) for name in TENSORS)})"
    return f"{_kept(node.target, scope)}({_listed(node.args, node.kwargs, names, scope)})"


def _listed(args: Sequence[Any], kwargs: dict[str, Any], names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    positional = [_text(value, names, scope) for value in args]
    return ", ".join([*positional, *(f"{name}={_text(value, names, scope)}" for name, value in kwargs.items())])


def _returned(outputs: Any, spec: pytree.TreeSpec | None, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    """The outputs in their containers, as source."""
    if spec is None:
        return _text(outputs, names, scope)
    if spec.is_leaf():
        return _text(outputs[0], names, scope)
    flat = [_text(value, names, scope) for value in outputs]
    if spec.type in (tuple, list) and all(child.is_leaf() for child in spec.children()):
        return f"({', '.join(flat)},)" if spec.type is tuple and flat else f"{spec.type.__name__}([{', '.join(flat)}])"
    return f"{_kept(pytree.tree_unflatten, scope)}([{', '.join(flat)}], {_kept(spec, scope)})"


def _text(value: Any, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    """An argument, as source."""
    if isinstance(value, fx.Node):
        return names[value]
    if type(value) is tuple:
        return f"({''.join(f'{_text(one, names, scope)}, ' for one in value)})"
    if isinstance(value, list):
        return f"[{', '.join(_text(one, names, scope) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_kept(key, scope)}: {_text(one, names, scope)}' for key, one in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({', '.join(_text(one, names, scope) for one in (value.start, value.stop, value.step))})"
    return repr(value) if value is None or type(value) in (bool, int, str) else _kept(value, scope)


def _kept(value: Any, scope: dict[str, Any]) -> str:
    """The name under which the source has an object."""
    name = f"k{len(scope)}"
    scope[name] = value
    return name
