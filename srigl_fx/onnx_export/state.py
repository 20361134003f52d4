"""State of a model as inputs and outputs of a graph: ONNX has no buffers that a call could write.

Owns the graph's new form, in which objects among inputs and outputs are taken apart, too. It must not know ONNX files,
nor how a session carries the state.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from srigl_fx.passes.program import copy_module, tensor_at
from srigl_fx.passes.state import writes
from srigl_fx.passes.trees import is_plain


@dataclass(frozen=True, kw_only=True)
class Explicit:
    """A graph that writes no buffers.

    Attributes:
        module: It takes the state after everything else, as keyword arguments, and returns the next state at the end.
        args: Example arguments.
        kwargs: Example keyword arguments, state included.
        state: The initial values, by the buffers' names.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, Tensor]


def of_leaves(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """The graph as a function of leaves where inputs or outputs are objects, which torch.onnx would make anew.

    Returns:
        A graph, and its arguments and keyword arguments: those that were given, where all are plain containers.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    info = getattr(module.graph._codegen, "pytree_info", None)
    if is_plain(spec) and (info is None or info.out_spec is None or is_plain(info.out_spec)):
        return module, args, kwargs
    made, _ = copy_module(module)
    names = [node.name for node in made.graph.find_nodes(op="placeholder")]
    (output,) = made.graph.find_nodes(op="output")
    returned = pytree.tree_structure(tuple(range(len(pytree.tree_leaves(output.args[0])))))
    given = pytree.tree_structure((tuple(leaves), {}))
    made.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, returned)))
    return fx.GraphModule(made, made.graph), tuple(leaves), {}


def explicit(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explicit:
    """The graph with each buffer that it writes as an input and an output; the same graph where it writes none.

    Args:
        module: A functional graph, but for ``copy_`` into buffers.
        args: Example arguments.
        kwargs: Example keyword arguments.

    Example:
        >>> import torch
        >>> class Sum(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("total", torch.zeros(2))
        ...     def forward(self, x):
        ...         self.total += x
        ...         return self.total * 2
        >>> from srigl_fx.passes.capture import capture_whole
        >>> module = capture_whole(Sum().eval(), (torch.ones(2),), {}).program.module
        >>> found = explicit(module, (torch.ones(2),), {})
        >>> found.state, found.module(torch.ones(2), state_0=torch.tensor([1.0, 5.0]))
        ({'total': tensor([0., 0.])}, (tensor([ 4., 12.]), [tensor([2., 6.])]))
    """
    names = list(writes(module.graph))
    if not names:
        return Explicit(module=module, args=args, kwargs=kwargs, state={})
    graph = fx.Graph()
    returned: Any = graph.graph_copy(module.graph, {})
    copied = writes(graph)
    last = list(graph.find_nodes(op="placeholder"))[-1]
    results: list[fx.Node] = []
    for position, name in enumerate(names):
        with graph.inserting_after(last):
            last = given = graph.placeholder(f"state_{position}")
        for node in graph.find_nodes(op="get_attr", target=name):
            given.meta.update(node.meta)
            node.replace_all_uses_with(given)
        writing = copied[name]
        value = writing.args[1]
        assert isinstance(value, fx.Node)
        writing.replace_all_uses_with(value)
        graph.erase_node(writing)
        results.append(value)
    graph.output((*returned, *results))
    graph.eliminate_dead_code()
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    order = [*info.orig_args[len(args) :]]
    state = {name: tensor_at(module, name).detach().clone() for name in names}
    extended = {
        **{name: kwargs[name] for name in order},
        **{f"state_{position}": value for position, value in enumerate(state.values())},
    }
    in_spec = pytree.tree_structure((args, extended))
    out_spec = pytree.tree_structure((pytree.tree_unflatten([0] * len(returned), info.out_spec), [0] * len(results)))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo([*info.orig_args, *list(extended)[len(order) :]], in_spec, out_spec)))
    graph.lint()
    made = fx.GraphModule(module, graph)
    return Explicit(module=made, args=args, kwargs=extended, state=state)
