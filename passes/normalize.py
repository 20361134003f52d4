"""The captured graph in the one form the later passes expect.

Owns :class:`Normalize`. It must not know masks or weights.
"""

from typing import cast

import torch
from torch import fx

from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.program import Program, arguments, pair, tensor_at

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


class Normalize(Pass[Program]):
    """Bring a captured graph into normal form.

    1. Assertions about metadata, sizes and ranges are dropped: the lowered module checks its inputs once.
    2. ``view`` and ``_unsafe_view`` become ``reshape``: a view was recorded for the strides that one particular kernel
       gave its output, and any replacement of that kernel would break it.
    3. ``conv2d`` with the padding "valid", or "same" where that is symmetric, gets its numbers.
    4. Nodes without users or effects go.
    """

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
            elif node.target in _VIEWS:
                node.target = aten.reshape.default
            elif node.target is not aten.conv2d.padding or not _number_padding(subject.module, node):
                continue
            changed = True
        changed |= graph.eliminate_dead_code()
        graph.lint()
        subject.module.recompile()
        return PassResult(subject=subject, changed=changed)

    def ensures(self, subject: Program) -> None:
        """Neither views nor assertions are left."""
        assert not any(node.target in _ASSERTIONS | _VIEWS for node in subject.module.graph.nodes)


def _number_padding(module: fx.GraphModule, node: fx.Node) -> bool:
    """Give a conv2d its padding as numbers; False where it has none that are symmetric."""
    given = arguments(node)
    dilation = pair(given["dilation"])
    weight = cast(fx.Node, given["weight"])
    padding = [0, 0]
    if given["padding"] == "same":
        if weight.op != "get_attr":
            return False
        kernel = tensor_at(module, str(weight.target)).shape[2:]
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in totals):
            return False
        padding = [total // 2 for total in totals]
    node.target = aten.conv2d.default
    node.args = (given["input"], weight, given["bias"], pair(given["stride"]), padding, dilation, given["groups"])
    node.kwargs = {}
    return True
