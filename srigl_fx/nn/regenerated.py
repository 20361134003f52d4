"""A module's own forward as code made from its torch.fx graph, with the values of chosen nodes handed in.

Owns tracing that is exact or refused, and the making of functions from graphs. It must not know which nodes are
chosen, nor what is handed in for them.

A torch.fx graph shows neither modes such as ``torch.no_grad()``, nor custom gradients, nor what a forward writes to its
module, and optional arguments are decided while it is traced. A forward with any of these is refused: what is made here
must compute what the original does, gradients included.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from srigl_fx.errors import SriglError


class RegenerationError(SriglError, RuntimeError):
    """A forward does more than its graph shows; the message says what."""


class _Shaped(fx.proxy.ParameterProxy):
    """A parameter's symbol, whose shape is known."""

    def size(self, dim: int | None = None) -> Any:
        """All sizes, or one of them."""
        return self.param.size() if dim is None else self.param.size(dim)


class _Tracer(fx.Tracer):
    """Children and given functions are leaves; what a graph cannot show is refused."""

    proxy_buffer_attributes = True  # else writes to a buffer would happen now, and never again

    def __init__(
        self,
        module: nn.Module,
        forward_name: str,
        leaves: tuple[Callable[..., Any], ...],
        exact: bool,
        like: Tensor | None,
    ) -> None:
        super().__init__(autowrap_functions=leaves)
        self.traced_func_name = forward_name
        self._exact, self._like = exact, like
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is a leaf."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The shapes of parameters are known, and so is that of an argument if all are as large as ``like``."""
        known = self._like if node.op == "placeholder" else self._parameters.get(str(node.target))
        if known is None or node.op not in ("placeholder", "get_attr"):
            return super().proxy(node)
        return _Shaped(self, node, node.name, nn.Parameter(known))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse a node that is not all there is to it."""
        if not self._exact:
            return super().create_node(*args, **kwargs)
        if not torch.is_grad_enabled():
            if _inside_a_function():
                raise RegenerationError("it has a gradient of its own (torch.autograd.Function)")
            raise RegenerationError("it computes under torch.no_grad()")
        if (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")) != self._autocast:
            raise RegenerationError("it switches autocast")
        return super().create_node(*args, **kwargs)


def _inside_a_function() -> bool:
    """Whether the forward of a torch.autograd.Function is running, as its frame on the stack tells."""
    functions = [torch.autograd.Function]
    for function in functions:  # grows while it is read: subclasses of subclasses
        functions += function.__subclasses__()
    codes = {getattr(function.forward, "__code__", None) for function in functions}
    return any(frame.f_code in codes for frame, _ in traceback.walk_stack(None))


def trace(
    module: nn.Module,
    *,
    training: bool,
    forward_name: str = "forward",
    exact: bool = True,
    like: Tensor | None = None,
) -> fx.Graph:
    """The graph of the module's own forward in training or evaluation mode; the module is left as it was.

    Functions of the forward's own source file that cannot be traced are called as they are.

    Args:
        module: Any.
        training: The mode.
        forward_name: The method to trace.
        exact: Whether code will be made of the graph; else it is only looked at, and may leave something out.
        like: A tensor of the shape that all arguments have, where that is known.

    Raises:
        RegenerationError: The graph would not be all of it.

    Example:
        >>> [node.op for node in trace(nn.Linear(3, 2), training=False).nodes]
        ['placeholder', 'get_attr', 'get_attr', 'call_function', 'output']
    """
    forward = getattr(type(module), forward_name)
    if not isinstance(forward, FunctionType) or "forward" in vars(module):
        raise RegenerationError("it is not a plain method of the class")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise RegenerationError(f"it takes the optional argument {str(parameter)!r}")
    helpers = [value for value in forward.__globals__.values() if isinstance(value, FunctionType)]
    helpers = [helper for helper in helpers if not helper.__module__.startswith("torch")]
    try:
        return _trace(module, training, _Tracer(module, forward_name, (), exact, like), exact)
    except RegenerationError:
        raise
    except Exception as first:  # user code under the tracer may raise anything
        try:
            return _trace(module, training, _Tracer(module, forward_name, tuple(helpers), exact, like), exact)
        except RegenerationError:
            raise
        except Exception:
            line = str(first).splitlines()[0] if str(first) else ""
            raise RegenerationError(f"torch.fx cannot trace it ({type(first).__name__}: {line})") from first


def _trace(module: nn.Module, training: bool, tracer: fx.Tracer, exact: bool) -> fx.Graph:
    with _as_it_was(module) as former, torch.enable_grad():
        module.training = training
        graph = tracer.trace(module)
        changed = [
            name
            for store, values in former.items()
            for name in {**values, **store_of(module, store)}
            if name != "training" and values.get(name) is not store_of(module, store).get(name)
        ]
    if changed and exact:
        made = "it makes constant tensors" if all(name.startswith("_tensor_constant") for name in changed) else ""
        raise RegenerationError(
            made or f"it writes to {', '.join(repr(name) for name in sorted(changed))} of the module"
        )
    return graph


def store_of(module: nn.Module, store: str) -> dict[str, Any]:
    """The attributes of a module ("" names them), or one of the tables among them."""
    found: dict[str, Any] = vars(module)[store] if store else vars(module)
    return found


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """Undo whatever is set on the module; yields the attributes as they were."""
    former = {store: dict(store_of(module, store)) for store in ("", "_parameters", "_buffers", "_modules")}
    try:
        yield former
    finally:
        for store, values in former.items():
            live = store_of(module, store)
            live.clear()
            live.update(values)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything its value is made of."""
    found, open_nodes = set(), [node]
    while open_nodes:
        at = open_nodes.pop()
        if at not in found:
            found.add(at)
            open_nodes += at.all_input_nodes
    return found


def named(graph: fx.Graph, name: str) -> fx.Node:
    """The node of that name."""
    node: fx.Node = next(node for node in graph.nodes if node.name == name)
    return node


def with_values(graph: fx.Graph, names: tuple[str, ...]) -> Callable[..., Any]:
    """The graph as a function of the module, the values of the named nodes, and the forward's own arguments."""
    new = fx.Graph()
    copies = {named(graph, name): new.placeholder(f"value_{i}") for i, name in enumerate(names)}
    replaced = set(copies)
    for node in graph.nodes:
        if node not in replaced:
            copies[node] = new.node_copy(node, copies.__getitem__)
    behind = set().union(*(ancestors(node) for node in replaced)) - replaced
    for node in reversed(list(graph.nodes)):
        if node in behind and not copies[node].users:
            new.erase_node(copies[node])
    return _function(new)


def between(graph: fx.Graph, source: str, end: str) -> Callable[..., Any]:
    """What the graph computes from the parameter ``source`` to the node ``end``, as a function of module and value."""
    new = fx.Graph()
    value = new.placeholder("value")
    copies: dict[fx.Node, fx.Node] = {}
    needed = ancestors(named(graph, end))
    for node in graph.nodes:
        if node in needed:
            is_source = node.op == "get_attr" and node.target == source
            copies[node] = value if is_source else new.node_copy(node, copies.__getitem__)
    new.output(copies[named(graph, end)])
    return _function(new)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module it reads from and the graph's placeholders."""
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<regenerated forward>", "exec"), namespace)
    made: Callable[..., Any] = namespace["forward"]
    return made
