"""Products with a stack of weights, one for each of some experts, as products with each.

Owns the reading of ``MatMul`` with a constant of three axes, and the nodes that compute the same. It must not know how
sparse a weight is.

Rules:
    1. Samples (experts, tokens, inputs) are cut along their first axis; each expert's are multiplied with its weight,
       and the products are put together.
    2. Samples that all experts share, (tokens, inputs) or (1, tokens, inputs), are multiplied with all weights at once,
       as with one weight of all experts' outputs, and the result is turned.
    3. Samples of another type or rank are refused, and those of which it is not known whether they are shared.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, constant, source_name
from srigl_fx.onnx_condensing.drafts import Draft, Names
from srigl_fx.onnx_condensing.expansion import Expansion, Product
from srigl_fx.onnx_condensing.match import unsuitable_type
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME

_USUAL_TOKENS: Final = 128  # where their number is free


def experts(node: ir.Node, names: Names) -> Expansion | None:
    """A MatMul with a stack of constant weights as one with each; None where it is none.

    Example:
        >>> x, w = ir.val("x", shape=[2, "n", 3]), ir.val("w", const_value=ir.tensor(np.ones((2, 3, 4), np.float32)))
        >>> found = experts(ir.node("MatMul", [x, w]), Names(ir.Model(ir.Graph([x], [], nodes=[]), ir_version=9)))
        >>> found.refused, len(found.products), found.shapes
        ('', 2, {'w': (2, 4, 3)})
    """
    weight = constant(node.inputs[1])
    x = node.inputs[0]
    if x is None or weight is None or weight.ndim != 3 or constant(x) is not None:
        return None
    count, inputs, outputs = weight.shape
    name = source_name(node.inputs[1])
    expansion = Expansion(node=node, operator="MatMul", shapes={name: (count, outputs, inputs)})
    shape = None if x.shape is None else list(x.shape)
    if problem := unsuitable_type(x):
        expansion.refused = problem
    elif shape is None or len(shape) not in (2, 3):
        expansion.refused = "its input is not known to have two or three axes, and its weight has three"
    elif len(shape) == 3 and shape[0] not in (1, count):
        expansion.refused = "it is not known whether its experts have the same input"
    else:
        tokens = shape[-2] if isinstance(shape[-2], int) else _USUAL_TOKENS
        draft = Draft(names, node.name or name)
        is_shared = len(shape) == 2 or (shape[0] == 1 and count != 1)
        y = _of_all(draft, x, shape, weight) if is_shared else _of_each(draft, x, shape, weight)
        expansion.draft, expansion.replaced, expansion.outputs = draft, node.outputs, [y]
        expansion.form = "all experts at once" if is_shared else f"{count} experts"
        expansion.products = [
            Product(node=one, weight=name, positions=tokens) for one in draft.nodes if one.op_type == "MatMul"
        ]
        calls, moved = len(draft.nodes) - 1, count * (outputs + (0 if is_shared else inputs))
        expansion.overhead = lambda batch: (
            (calls - len(expansion.products)) * ONNXRUNTIME.dense_call + batch * tokens * moved / ONNXRUNTIME.move_rate
        )
    return expansion


def _of_each(draft: Draft, x: ir.Value, shape: Sequence[Any], weight: Array) -> ir.Value:
    """Rule 1."""
    count, _, outputs = weight.shape
    parts = [x]
    if count > 1:
        parts = draft.add_several("Split", x, shapes=[[1, *shape[1:]]] * count, axis=0, num_outputs=count)
    products = [
        draft.add("MatMul", part, draft.constant(one, f"expert{i}"), shape=[1, shape[1], outputs])
        for i, (part, one) in enumerate(zip(parts, weight, strict=True))
    ]
    return draft.add("Concat", *products, shape=[count, shape[1], outputs], axis=0)


def _of_all(draft: Draft, x: ir.Value, shape: Sequence[Any], weight: Array) -> ir.Value:
    """Rule 2."""
    count, inputs, outputs = weight.shape
    if len(shape) == 3:
        x = draft.add("Squeeze", x, draft.constant(np.array([0]), "axis"), shape=shape[1:])
    flat = draft.constant(weight.transpose(1, 0, 2).reshape(inputs, count * outputs), "experts")
    product = draft.add("MatMul", x, flat, shape=[shape[-2], count * outputs])
    sizes = draft.constant(np.array([0, count, outputs]), "sizes")
    cut = draft.add("Reshape", product, sizes, shape=[shape[-2], count, outputs])
    return draft.add("Transpose", cut, shape=[count, shape[-2], outputs], perm=[1, 0, 2])
