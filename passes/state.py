"""The buffers that a captured graph writes: the state of a model.

Owns which they are, and that a graph has its own. It must not know what is done with them.
"""

import torch
from torch import fx, nn

from srigl_fx.passes.program import tensor_at


def writes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes that write buffers, by the buffers' names.

    Example:
        >>> class Counter(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("calls", torch.zeros(1))
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x / self.calls
        >>> from srigl_fx.passes.capture import capture_whole
        >>> list(writes(capture_whole(Counter().eval(), (torch.ones(2),), {}).program.module.graph))
        ['calls']
    """
    return {
        str(node.args[0].target): node
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
    }


def own_state(module: fx.GraphModule) -> None:
    """Give a graph copies of the buffers that it writes, so that running it does not change whose they were."""
    for name in writes(module.graph):
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        setattr(owner, attribute, tensor_at(module, name).detach().clone())


def kept_in(model: nn.Module, name: str) -> str:
    """A buffer and its module, in words.

    Example:
        >>> kept_in(nn.Sequential(nn.BatchNorm1d(2)), "0.running_mean")
        "the buffer 'running_mean' of 0 (BatchNorm1d)"
    """
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = getattr(type(owner), "_srigl_fx_dense_class", type(owner)).__name__
    return f"the buffer {attribute!r} of {path or 'the model'} ({kind})"
