"""Tensors that several layers of eight bits read, rounded once.

Owns :class:`RoundOnce` and its rules. It must not know kernels, nor where a scale comes from.
"""

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condensed_nodes import ROUND, condensed_nodes, set_arguments
from srigl_fx.passes.program import Program, arguments


class RoundOnce(Pass[Program]):
    """Round a tensor once for all condensed operators that read it with one given scale.

    Queries, keys and values are three layers that are handed the same tensor: each would round it for itself.

    1. Where several condensed operators round the same tensor with the same given scale and offset, ``round_samples``
       does so in front of the first of them, and they read its bytes.
    2. A tensor that one operator rounds stays as it is: that rounds while it reads. So does one that is needed with
       scales found at each call.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph, notes = subject.module.graph, []
        readers: dict[tuple[fx.Node, float, int], list[fx.Node]] = {}
        for node in condensed_nodes(graph):
            given = arguments(node)
            value = given["x"].meta.get("val")
            if given["x_scale"] is not None and isinstance(value, Tensor) and value.dtype is torch.float32:
                readers.setdefault((given["x"], given["x_scale"], given["x_offset"]), []).append(node)
        for (x, scale, offset), nodes in readers.items():
            if len(nodes) < 2:  # rule 2
                continue
            with graph.inserting_before(nodes[0]):
                rounded = graph.call_function(ROUND, (x, scale, offset))
            rounded.meta = {**x.meta, "val": torch.empty_like(x.meta["val"], dtype=torch.uint8)}
            for node in nodes:
                set_arguments(node, x=rounded)
            notes.append(Note(where=x.name, reason=f"rounded once for {len(nodes)} layers"))
        if notes:
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=bool(notes), notes=tuple(notes))
