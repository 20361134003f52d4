"""A run of a program's graph that looks at each use of a layer as it comes by.

Owns the run. It must not know what is looked at, nor keep any value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.program import Program, Use


def run_uses(
    program: Program,
    seen: Callable[[Use, Tensor, Tensor], None],
    batch: int | None = None,
    inputs: Inputs | None = None,
) -> None:
    """Run the graph of a matched program on its example inputs, and show each use with its input and its output.

    Buffers that the model writes are as they were afterwards, and so is the random state.

    Args:
        program: Its layers are known, and not rewritten yet.
        seen: Called with a use, what the graph hands it, and what it gives.
        batch: The batch size; by default that of the example inputs.
        inputs: Others than the example inputs.
    """
    given = program.inputs(program.batch_size if batch is None else batch) if inputs is None else inputs
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _Runner(program, seen).run(*pytree.tree_leaves(given), enable_io_processing=False)


class _Runner(fx.Interpreter):
    def __init__(self, program: Program, seen: Callable[[Use, Tensor, Tensor], None]) -> None:
        super().__init__(program.module)
        self._uses = {use.node: use for layer in program.layers for use in layer.uses}
        self._seen = seen

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.copy_.default:  # a buffer that the model updates: it is the model's own
            return self.env[n.args[1]]  # type: ignore[index]
        if n not in self._uses:
            return super().run_node(n)
        x = self.env[self._uses[n].x]
        y = super().run_node(n)
        self._seen(self._uses[n], x, y)
        return y
