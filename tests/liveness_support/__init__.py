"""Graphs with a free batch size that are written by hand: what questions about the batch are asked of."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from srigl_fx.passes.fake_values import fake_result
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import Sizes

aten = torch.ops.aten


class Batched:
    """A graph in the making whose values have a size that is free; its first input ``x`` is (B, 4, 6)."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False))
        self.root, self.graph = nn.Module(), fx.Graph()
        self.inputs: list[Tensor] = []
        self.x = self.input(5, 4, 6)
        self.size = self.call(aten.sym_size.int, self.x, 0)

    def input(self, *sizes: int, axis: int | tuple[int, ...] | None = 0, dtype: torch.dtype = torch.float32) -> fx.Node:
        """An input that is B long along ``axis``, whatever its size there is; as free along each of several axes."""
        free = axis if isinstance(axis, tuple) else (axis,)
        kinds = [DimDynamic.DYNAMIC if dim in free else DimDynamic.STATIC for dim in range(len(sizes))]
        context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=kinds)
        node = self.graph.placeholder(f"input{len(self.inputs)}")
        self.inputs.append(torch.ones(sizes, dtype=dtype))
        node.meta["val"] = self.mode.from_tensor(self.inputs[-1], symbolic_context=context)
        return node

    def constant(self, value: Tensor) -> fx.Node:
        name = f"c{len(self.root._buffers)}"
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(operator, args, kwargs)
        given, named = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        node.meta["val"] = fake_result(self.mode, operator, given, named)
        return node

    def finish(self, *outputs: fx.Node) -> Program:
        """What was made, as a program; all inputs count as batched."""
        self.graph.output(outputs)
        module = fx.GraphModule(self.root, self.graph)
        sizes = Sizes.of_batch((True,) * len(self.inputs))
        return Program(module=module, model=module, args=tuple(self.inputs), kwargs={}, sizes=sizes, how="by hand")

    def merged(self) -> fx.Node:
        """x with samples and channels along one axis: (4 B, 6)."""
        return self.call(aten.reshape.default, self.x, [-1, 6])

    def samples_last(self) -> fx.Node:
        """x as (4, 6, B)."""
        return self.call(aten.permute.default, self.x, [1, 2, 0])
