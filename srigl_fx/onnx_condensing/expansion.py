"""A node that is no product with one weight, as nodes of which some are.

Owns what such nodes are, and what they are estimated to take in all. It must not know of which operators there are any,
nor how a product is condensed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from srigl_fx.onnx_condensing.drafts import Draft


@dataclass(kw_only=True)
class Product:
    """One of the nodes of an expansion: a ``MatMul``, a ``Gemm`` or a ``Conv`` with a constant weight.

    Attributes:
        node: The node.
        weight: The weight of the file that its own is a part of.
        runs: How often it is run at each call.
        positions: How often each weight is used with one sample at each run; None where the shapes say it.
    """

    node: ir.Node
    weight: str
    runs: int = 1
    positions: int | None = None


@dataclass(kw_only=True)
class Expansion:
    """What can take the place of a node.

    Attributes:
        node: The node.
        operator: Its operator, for the report.
        form: What the report says of it, behind "condensed"; "" is nothing.
        shapes: The shape of each weight, outputs first, by its name.
        draft: The nodes.
        replaced: Values of the graph, and below what is read in their place, or None where nothing reads one.
        outputs: These.
        products: Those of the nodes that multiply with a weight.
        overhead: The seconds that the other nodes take beyond what the node took, by the number of samples.
        is_rounded: Whether the node computed with bytes.
        refused: Why it cannot be; "" where it can.
    """

    node: ir.Node
    operator: str
    form: str = ""
    shapes: dict[str, tuple[int, ...]]
    draft: Draft | None = None
    replaced: Sequence[ir.Value] = ()
    outputs: Sequence[ir.Value | None] = ()
    products: Sequence[Product] = ()
    overhead: Callable[[int], float] = field(default=lambda batch: 0.0)
    is_rounded: bool = False
    refused: str = ""

    def put(self) -> None:
        """Take the node's place."""
        assert self.draft is not None
        self.draft.put(self.node, self.replaced, self.outputs)
