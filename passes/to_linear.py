"""One form for what is a linear layer.

Owns :class:`ToLinear`: matrix products and einsums that multiply the data with a masked weight become ``linear``, so
that the passes after it know one contraction. It must not know what is done with a layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.fake_values import fake_result
from srigl_fx.passes.program import MaskedTensor, Program, arguments, new_buffer, tensor_at

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default})


class ToLinear(Pass[Program]):
    """Write products of data and a masked weight as ``linear``: ``linear(x, W) = x W.T``.

    1. ``addmm`` with a bias vector, unscaled, ``mm`` and ``matmul`` with a masked (in, out) matrix on the right.
    2. ``mm`` and ``matmul`` with a masked (out, in) matrix on the left, between two transpositions.
    3. ``einsum`` of the data and a masked weight that contracts the last axes of the data, in the order that the weight
       has them in, and puts the weight's other axes last: between a flattening and an unflattening where there are
       several.
    """

    only_improves = True

    @torch.no_grad()
    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        changed = False
        for node in list(graph.nodes):
            if node.target is aten.einsum.default:
                changed |= _einsum(subject, node)
            elif node.target in _PRODUCTS or node.target is aten.addmm.default:
                changed |= _product(subject, node)
        if changed:
            graph.eliminate_dead_code()
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=changed)


def _masked(program: Program, node: object) -> MaskedTensor | None:
    return program.masked.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _product(program: Program, node: fx.Node) -> bool:
    given = arguments(node)
    bias = None
    if node.target is aten.addmm.default:
        bias, left, right = given["self"], given["mat1"], given["mat2"]
        vector = isinstance(bias, fx.Node) and getattr(bias.meta.get("val"), "dim", lambda: 0)() == 1
        if given["alpha"] != 1 or given["beta"] != 1 or not vector:
            return False
    else:
        left, right = node.args[:2]
    if (masked := _masked(program, right)) and masked.mask.dim() == 2 and _masked(program, left) is None:
        weight, mask = tensor_at(program.module, str(right.target)).t(), masked.mask.t()
        _replace(program, node, left, masked.fqn, weight, mask, bias=bias)
        return True
    if bias is None and (masked := _masked(program, left)) and masked.mask.dim() == 2:
        value = right.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 2 or _masked(program, right) is not None:
            return False
        weight = tensor_at(program.module, str(left.target))
        _replace(program, node, right, masked.fqn, weight, masked.mask, across=True)
        return True
    return False


def _einsum(program: Program, node: fx.Node) -> bool:
    equation, tensors = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(tensors, list | tuple)
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    which = [place for place, tensor in enumerate(tensors) if _masked(program, tensor)]
    if len(terms) != 2 or not arrow or len(which) != 1:
        return False
    source, x = tensors[which[0]], tensors[1 - which[0]]
    masked = _masked(program, source)
    assert masked is not None
    assert isinstance(source, fx.Node)
    matrix, data = terms[which[0]], terms[1 - which[0]]
    order = _order(matrix, data, result)
    if order is None:
        return False
    inside, outside = order
    axes = [matrix.index(letter) for letter in outside + inside]
    sizes = [masked.mask.shape[axis] for axis in axes[: len(outside)]]

    def flat(tensor: Tensor) -> Tensor:
        return tensor.permute(axes).reshape(math.prod(sizes), -1)

    weight = flat(tensor_at(program.module, str(source.target)))
    _replace(program, node, x, masked.fqn, weight, flat(masked.mask), inside=len(inside), outside=sizes)
    return True


def _order(matrix: str, data: str, result: str) -> tuple[str, str] | None:
    """The weight's letters that are contracted and that are kept, in order; None where it is no linear layer.

    Example:
        >>> _order("hnd", "bth", "btnd"), _order("hnd", "bnd", "bh"), _order("tc", "btc", "btc")
        (('h', 'nd'), ('nd', 'h'), None)
    """
    if not matrix.isalpha() or len(set(matrix)) != len(matrix):
        return None
    inside = "".join(letter for letter in matrix if letter in data)
    outside = "".join(letter for letter in matrix if letter not in data)
    if not inside or not outside or not data.endswith(inside) or any(letter in result for letter in inside):
        return None
    kept = data.removesuffix(inside)
    letters = kept.replace("...", "")
    return (inside, outside) if result == kept + outside and len(set(letters)) == len(letters) else None


def _replace(
    program: Program,
    node: fx.Node,
    x: Any,
    fqn: str,
    weight: Tensor,
    mask: Tensor,
    *,
    bias: Any = None,
    across: bool = False,
    inside: int = 1,
    outside: list[int] | None = None,
) -> None:
    """Put a linear node in ``node``'s place: the weight (out, in) contracts the last ``inside`` axes of the data."""
    graph = program.module.graph
    with graph.inserting_before(node):
        source = new_buffer(program.module, fqn, weight)
        program.masked[str(source.target)] = MaskedTensor(fqn=fqn, mask=mask)
        if inside > 1:
            x = _call(node, aten.flatten.using_ints, x, -inside, -1)
        if across:
            x = _call(node, aten.transpose.int, x, -1, -2)
        y = _call(node, aten.linear.default, x, source, bias)
        if across:
            y = _call(node, aten.transpose.int, y, -1, -2)
        if outside is not None and len(outside) > 1:
            y = _call(node, aten.unflatten.int, y, -1, outside)
    node.replace_all_uses_with(y)
    graph.erase_node(node)


def _call(node: fx.Node, function: Any, *args: Any) -> fx.Node:
    """A node with the provenance of ``node`` and a value computed from its operands'."""
    new = node.graph.call_function(function, args)
    values = fx.node.map_arg(args, lambda operand: operand.meta["val"])
    fake = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    new.meta = {name: value for name, value in node.meta.items() if name != "val"}
    if fake is not None:
        held = [fake.from_tensor(v, static_shapes=True) if _is_real(v) else v for v in values]
        new.meta["val"] = fake_result(fake, function, held)
    else:
        new.meta["val"] = function(*values)
    return new


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)
