"""What becomes of each node of a model, and its row in the report.

Owns these decisions, node by node in the order of the graph, graphs inside nodes too; each weight is read only then. It
must not know how a layer is found or rewritten.

Rules:
    1. A product with one weight is condensed where enough of it is zero and its form gains (the module ``form``).
    2. A node that is several products with other nodes around them is taken apart where that gains in all, beside the
       node as it is. Then of its products each is condensed that has enough zeros and takes fewer bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.byte_operators import of_bytes
from srigl_fx.onnx_condensing.drafts import Names
from srigl_fx.onnx_condensing.expansion import Expansion
from srigl_fx.onnx_condensing.experts import experts
from srigl_fx.onnx_condensing.form import BATCHES, Form
from srigl_fx.onnx_condensing.match import Contraction, contraction, take_epilogue
from srigl_fx.onnx_condensing.quantised import EightBits, eight_bits
from srigl_fx.onnx_condensing.recurrent import recurrent
from srigl_fx.onnx_condensing.report import CondensingRow
from srigl_fx.onnx_condensing.rewrite import condense
from srigl_fx.onnx_export.weights import let_go

_EXPANDED: Final[dict[tuple[str, str], Callable[[ir.Node, Names], Expansion | None]]] = {
    ("", "LSTM"): recurrent,
    ("", "GRU"): recurrent,
    ("", "MatMul"): experts,
    ("", "QLinearConv"): of_bytes,
    ("", "QLinearMatMul"): of_bytes,
    ("com.microsoft", "QGemm"): of_bytes,
    ("", "ConvInteger"): of_bytes,
    ("", "MatMulInteger"): of_bytes,
}


def expanded(node: ir.Node, names: Names) -> Expansion | None:
    """A node as several, products with constant weights among them; None where it is no such node.

    Example:
        >>> expanded(ir.node("Relu", [ir.val("x")]), Names(ir.Model(ir.Graph([], [], nodes=[]), ir_version=9))) is None
        True
    """
    expand = _EXPANDED.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
    return None if expand is None else expand(node, names)


def estimated_speedup(expansion: Expansion, min_sparsity: float, batch: int) -> float:
    """How many times as fast as the node its expansion is estimated to be, with what of it can be condensed.

    Args:
        expansion: One that is not refused.
        min_sparsity: The fraction of a weight that must be zero.
        batch: The number of samples.
    """
    return _speedup(expansion, _plans(expansion, min_sparsity), batch)


def condense_all(model: ir.Model, min_sparsity: float, least: float) -> list[CondensingRow]:
    """Condense what gains, and say what became of every layer with a constant weight.

    Args:
        model: The model, which is changed.
        min_sparsity: The fraction of a weight that must be zero.
        least: How many times as fast as dense a layer must be at least; 0 condenses all that can be.

    Example:
        >>> condense_all(ir.Model(ir.Graph([], [], nodes=[]), ir_version=9), 0.5, 1.0)
        []
    """
    names, rows = Names(model), list[CondensingRow]()
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        read = [value.const_value for value in node.inputs if value is not None]
        if (one := contraction(node)) is not None:
            rows.append(_settle(one, names, min_sparsity, least))
        elif (expansion := expanded(node, names)) is not None:
            rows += _settle_expansion(expansion, names, min_sparsity, least)
        one = expansion = None
        for tensor in read:
            let_go(tensor)
    return rows


@dataclass(kw_only=True)
class _Plan:
    """How one product would be condensed, and why it cannot be."""

    one: Contraction
    form: Form
    numbers: EightBits | None
    zeros: int
    refused: str
    why_float: str

    def carry_out(self, names: Names) -> None:
        take_epilogue(self.one)
        condense(self.one, self.form.parts, self.numbers, names)


def _plan(one: Contraction, min_sparsity: float, *, is_rounded: bool = False) -> _Plan:
    kept = one.matrix != 0
    zeros = kept.size - int(np.count_nonzero(kept))
    share = zeros / kept.size if kept.size else 0.0
    numbers = "" if one.refused else eight_bits(one)
    refused = one.refused
    if share < min_sparsity:
        refused = f"{share:.1%} of it is zero, and min_sparsity is {min_sparsity:.0%}"
    elif zeros == kept.size:
        refused = "all of it is zero"
    elif not np.isfinite(one.matrix).all():
        refused = "it holds numbers that are not finite"
    carried = numbers if isinstance(numbers, EightBits) else None
    is_rounded = is_rounded or carried is not None or bool(numbers)  # in the source
    form = Form(one, kept, is_rounded=is_rounded, eight_bits=carried is not None)
    why_float = f"in float32: {numbers}" if isinstance(numbers, str) and numbers else ""
    return _Plan(one=one, form=form, numbers=carried, zeros=zeros, refused=refused, why_float=why_float)


def _settle(one: Contraction, names: Names, min_sparsity: float, least: float) -> CondensingRow:
    plan = _plan(one, min_sparsity)
    reason = plan.refused or plan.form.problem(least)
    if not reason:
        plan.carry_out(names)
    return CondensingRow(
        name=one.weight,
        operator=one.node.op_type,
        shape=one.weight_shape,
        sparsity=plan.zeros / one.matrix.size if one.matrix.size else 0.0,
        condensed=not reason,
        eight_bits=not reason and plan.numbers is not None,
        parts=0 if reason else len(plan.form.parts),
        reason=reason or plan.why_float,
    )


def _settle_expansion(expansion: Expansion, names: Names, min_sparsity: float, least: float) -> list[CondensingRow]:
    """Rule 2."""
    plans = [] if expansion.refused else _plans(expansion, min_sparsity)
    reason = expansion.refused or _problem(expansion, plans, least)
    if not reason:
        expansion.put()
        for plan in plans:
            if not plan.refused:
                plan.carry_out(names)
    elif expansion.draft is not None:
        expansion.draft.let_go()
    return [_row(expansion, weight, plans, reason) for weight in expansion.shapes]


def _plans(expansion: Expansion, min_sparsity: float) -> list[_Plan]:
    plans = []
    for product in expansion.products:
        one = contraction(product.node)
        assert one is not None  # that is what products are
        one.weight, one.positions = product.weight, product.positions
        plan = _plan(one, min_sparsity, is_rounded=expansion.is_rounded)
        plan.refused = plan.refused or plan.form.padding
        plans.append(plan)
    return plans


def _problem(expansion: Expansion, plans: list[_Plan], least: float) -> str:
    """Why a node is better left as it is, or ""."""
    if all(plan.refused for plan in plans):
        return plans[0].refused if plans else "it has no weight"
    for batch in BATCHES if least > 0 else ():
        if (ratio := _speedup(expansion, plans, batch)) < least:
            return f"estimated: condensed is {ratio:.2f} times as fast as the {expansion.operator} at batch {batch}"
    return ""


def _speedup(expansion: Expansion, plans: list[_Plan], batch: int) -> float:
    """How many times as fast as the node what takes its place is estimated to be."""
    before, after = 0.0, expansion.overhead(batch)
    for plan, product in zip(plans, expansion.products, strict=True):
        dense = plan.form.dense_seconds(batch)
        before += product.runs * dense
        after += product.runs * (dense if plan.refused else plan.form.seconds(batch))
    return before / after


def _row(expansion: Expansion, weight: str, plans: list[_Plan], reason: str) -> CondensingRow:
    """What became of one of the weights."""
    own = [plan for plan in plans if plan.one.weight == weight]
    size = sum(plan.one.matrix.size for plan in own)
    condensed = [] if reason else [plan for plan in own if not plan.refused]
    why = reason or next((plan.refused for plan in own if plan.refused), "")
    return CondensingRow(
        name=weight,
        operator=expansion.operator,
        shape=expansion.shapes[weight],
        sparsity=sum(plan.zeros for plan in own) / size if size else 0.0,
        condensed=bool(condensed),
        eight_bits=any(plan.numbers is not None for plan in condensed),
        parts=max((len(plan.form.parts) for plan in condensed), default=0),
        reason=why or next((plan.why_float for plan in own if plan.why_float), ""),
        form_of_all=expansion.form if condensed else "",
    )
