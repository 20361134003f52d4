"""The graph of a single layer, built without ``torch.export``.

Owns the layers for which that can be done: linear and convolution modules that are called by their own forward. Such a
graph takes inputs of any leading shape. It must not know regions.

1. The layer has the forward of its class and no hooks: what else may happen when it is called is not in the graph.
2. Its weight is a plain parameter, not one that a parametrisation computes anew at each call.
3. It is called with one tensor, by position, of its weight's type; a convolution, with a batch axis.
4. ``linear`` is x W.T + b on the last axis, so all other sizes are free. Of a convolution, batch and places are; the
   channels are fixed. A convolution that pads with other than zeros is two operators, and left to export.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from srigl_fx.passes.fake_values import fake_result
from srigl_fx.passes.program import Program
from srigl_fx.passes.regions.recording import ModuleCall
from srigl_fx.passes.sizes import Sizes

aten = torch.ops.aten

_CONVOLUTIONS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Conv1d: (aten.conv1d.default, aten.conv1d.padding),
    nn.Conv2d: (aten.conv2d.default, aten.conv2d.padding),
    nn.Conv3d: (aten.conv3d.default, aten.conv3d.padding),
}


def module_local(model: nn.Module, module: nn.Module, calls: list[ModuleCall]) -> Program | None:
    """The program of one layer as it was called; None where it is not a layer that this can be done for.

    Args:
        model: The model it is part of.
        module: The layer.
        calls: What it was called with.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> leaves, spec = pytree.tree_flatten(((torch.ones(4, 3),), {}))
        >>> program = module_local(layer, layer, [ModuleCall(leaves, spec)])
        >>> program.module(torch.ones(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """
    layer: Any = module
    built = _operator(layer)  # rules 1, 2 and 4
    plain = pytree.tree_structure(((0,), {}))
    # Rule 3.
    if built is None or any(
        call.problem or call.spec != plain or not isinstance(call.leaves[0], Tensor) for call in calls
    ):
        return None
    operator, settings, spatial = built
    if spatial is not None and any(call.leaves[0].dim() != spatial + 2 for call in calls):
        return None
    example = calls[0].leaves[0]
    if example.dtype != layer.weight.dtype or not example.dim():
        return None
    graph = fx.Graph()
    # As export makes them: arguments and results are flattened and put together again by the graph's generated code.
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(["input"], plain, pytree.tree_structure(0))))
    nodes = [graph.placeholder("input"), graph.get_attr("weight")]
    if layer.bias is not None:
        nodes.append(graph.get_attr("bias"))
    operands = [*nodes, None][:3]
    result = graph.call_function(operator, (*operands, *settings))
    graph.output((result,))
    holder: Any = nn.Module()  # the layer's parameters without its class: a GraphModule copies what the graph reads
    holder.weight, holder.bias = layer.weight, layer.bias
    for node, value in zip([*nodes, result], _values(example, layer, operator, settings, spatial), strict=True):
        node.meta["val"] = value
        node.meta["nn_module_stack"] = {"": ("", type(module).__qualname__)}
    return Program(
        module=fx.GraphModule(holder, graph),
        model=model,
        args=(example,),
        kwargs={},
        how="module-local, any leading shape",
        sizes=Sizes.of_batch((True,)),
    )


def _operator(layer: Any) -> tuple[Any, tuple[Any, ...], int | None] | None:
    """The operator of a layer, what it takes after the bias, and its number of spatial dimensions (None for linear)."""
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in vars(layer)
        or "weight" not in layer._parameters
    ):
        return None
    if type(layer).forward is nn.Linear.forward:  # of a subclass too, such as the mask-managed one
        return aten.linear.default, (), None
    for cls, (by_number, by_name) in _CONVOLUTIONS.items():
        if type(layer).forward is cls.forward and layer.padding_mode == "zeros":
            settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
            operator = by_name if isinstance(layer.padding, str) else by_number
            listed = tuple(list(value) if isinstance(value, tuple) else value for value in settings)
            return operator, listed, len(layer.kernel_size)
    return None


def _values(example: Tensor, layer: Any, operator: Any, settings: tuple[Any, ...], spatial: int | None) -> list[Any]:
    """Fake values of input, weight, bias where there is one, and result; all leading and spatial sizes free."""
    # By default, sizes of 0 and 1 are constants, and equal sizes one symbol: neither is so for any leading shape.
    shapes = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fixed = example.dim() - 1 if spatial is None else 1
    sizes = [DimDynamic.STATIC if dim == fixed else DimDynamic.DYNAMIC for dim in range(example.dim())]
    with torch.no_grad():
        x = mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        operands = [
            mode.from_tensor(p.detach(), static_shapes=True) for p in (layer.weight, layer.bias) if p is not None
        ]
        return [x, *operands, fake_result(mode, operator, (x, *[*operands, None][:2], *settings))]
