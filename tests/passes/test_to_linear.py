"""Products that become linear layers, on graphs that are written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.passes.base import run
from srigl_fx.passes.program import MaskedTensor, Program
from srigl_fx.passes.to_linear import ToLinear, _order

aten = torch.ops.aten
Make = Callable[..., fx.Node]

MASK = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * MASK


def program_of(make: Make, x: Tensor, weight: Tensor = WEIGHT, mask: Tensor = MASK, *more: Tensor) -> Program:
    """A graph of an input x, a masked weight and other constants, which ``make`` computes the output from."""
    root, graph = nn.Module(), fx.Graph()
    nodes = [graph.placeholder("x")]
    nodes[0].meta["val"] = x
    for name, tensor in zip(("weight", "c", "d"), (weight, *more), strict=False):
        root.register_buffer(name, tensor)
        nodes.append(graph.get_attr(name))
        nodes[-1].meta["val"] = tensor
    out = make(graph, *nodes)
    out.meta["val"] = torch.empty(0)
    graph.output(out)
    module = fx.GraphModule(root, graph)
    program = Program(module=module, model=module, args=(x,), kwargs={}, how="by hand")
    program.masked = {"weight": MaskedTensor(fqn="layer.weight", mask=mask)}
    return program


def rewritten(program: Program) -> list[str]:
    """The operators after the pass, which compute what those before did; weights are zero off their masks."""
    expected = program.module(*program.args)
    result = run((ToLinear(),), program)
    module = result.subject.module
    torch.testing.assert_close(module(*program.args), expected, rtol=1e-5, atol=1e-5)
    nodes: list[Any] = [node for node in module.graph.nodes if node.op == "call_function"]
    for node in nodes:
        if node.target is aten.linear.default:
            masked = result.subject.masked[str(node.args[1].target)]
            weight = module.get_buffer(str(node.args[1].target))
            assert masked.fqn == "layer.weight"
            assert masked.mask.shape == weight.shape
            assert not bool(weight[~masked.mask].any())
            assert bool(weight[masked.mask].all())
    names = [str(node.target).removeprefix("aten.").partition(".")[0] for node in nodes]
    assert result.changed == ("linear" in names)
    return names


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
BIAS = torch.randn(6, generator=torch.Generator().manual_seed(3))


def call(operator: Any, *order: int, **settings: Any) -> Make:
    """The operator on x (0), the weight (1) and the other constants, in this order."""
    return lambda graph, *nodes: graph.call_function(operator, tuple(nodes[i] for i in order), settings)


@pytest.mark.parametrize(
    ("make", "x", "more", "expected"),
    [
        (call(aten.mm.default, 0, 1), X, (), ["linear"]),
        (call(aten.matmul.default, 0, 1), X.expand(2, 3, 4), (), ["linear"]),
        (call(aten.matmul.default, 0, 1), X[0], (), ["linear"]),
        (call(aten.addmm.default, 2, 0, 1), X, (BIAS,), ["linear"]),
        (call(aten.addmm.default, 2, 0, 1, alpha=2), X, (BIAS,), ["addmm"]),
        (call(aten.addmm.default, 2, 0, 1, beta=2), X, (BIAS,), ["addmm"]),
        (call(aten.addmm.default, 2, 0, 1), X, (BIAS.expand(3, 6),), ["addmm"]),
        (call(aten.mm.default, 1, 0), X[:, :2].new_ones(6, 5), (), ["transpose", "linear", "transpose"]),
        (call(aten.matmul.default, 1, 0), X.new_ones(2, 6, 5), (), ["transpose", "linear", "transpose"]),
        (call(aten.matmul.default, 1, 0), BIAS, (), ["matmul"]),  # nothing to transpose
        (call(aten.addmm.default, 2, 1, 0), X.new_ones(6, 5), (BIAS[:5],), ["addmm"]),  # a bias along the other axis
        (call(aten.bmm.default, 0, 0), X.new_ones(2, 3, 3), (), ["bmm"]),
    ],
    ids=[
        "mm", "matmul", "a vector", "addmm", "alpha", "beta", "a matrix is added", "on the left", "on the left of many",
        "on the left of a vector", "on the left, with a bias", "no masked operand",
    ],
)  # fmt: skip
def test_rules_1_and_2_products(make: Make, x: Tensor, more: tuple[Tensor, ...], expected: list[str]) -> None:
    assert rewritten(program_of(make, x, WEIGHT, MASK, *more)) == expected


def test_rule_1_takes_matrices_alone() -> None:
    stack, mask = torch.stack([WEIGHT, WEIGHT]), torch.stack([MASK, MASK])
    assert rewritten(program_of(call(aten.matmul.default, 0, 1), X, stack, mask)) == ["matmul"]
    assert rewritten(program_of(call(aten.matmul.default, 1, 0), X.new_ones(6, 5), stack, mask)) == ["matmul"]


def test_a_product_of_two_masked_matrices_stays() -> None:
    square, mask = WEIGHT[:, :4].clone(), MASK[:, :4]
    assert rewritten(program_of(call(aten.mm.default, 1, 1), X, square, mask)) == ["mm"]


def einsum(equation: str, *order: int) -> Make:
    return lambda graph, *nodes: graph.call_function(aten.einsum.default, (equation, [nodes[i] for i in order]))


STACK_MASK = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(4)) < 0.5
STACK = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(5)) * STACK_MASK


@pytest.mark.parametrize(
    ("equation", "x", "order", "stack", "expected"),
    [
        ("bi,io->bo", X, (0, 1), False, ["linear"]),
        ("io, bi -> bo", X, (1, 0), False, ["linear"]),
        ("...i,io->...o", X.expand(2, 3, 4), (0, 1), False, ["linear"]),
        ("bh,hnd->bnd", X, (0, 1), True, ["linear", "unflatten"]),
        ("bnd,hnd->bh", X.new_ones(3, 2, 3), (0, 1), True, ["flatten", "linear"]),
        ("bi,io->ob", X, (0, 1), False, ["einsum"]),  # the weight's axes are not last
        ("bi,io", X, (0, 1), False, ["einsum"]),
        ("bi,io,b->bo", X, (0, 1, 2), False, ["einsum"]),
        ("bi,bo->io", X, (0, 0), False, ["einsum"]),  # no weight
        ("bi,ij->bj", WEIGHT[:, :4], (1, 1), False, ["einsum"]),  # two of them
    ],
)
def test_rule_3_einsums(equation: str, x: Tensor, order: tuple[int, ...], stack: bool, expected: list[str]) -> None:
    if order == (1, 1):
        program = program_of(einsum(equation, 1, 1), X, WEIGHT[:, :4].clone(), MASK[:, :4])
    elif equation == "bi,bo->io":
        program = program_of(einsum(equation, 0, 0), X)
    else:
        weight, mask = (STACK, STACK_MASK) if stack else (WEIGHT, MASK)
        program = program_of(einsum(equation, *order), x, weight, mask, torch.ones(3))
    assert rewritten(program) == expected


@pytest.mark.parametrize(
    ("matrix", "data", "result", "order"),
    [
        ("io", "bi", "bo", ("i", "o")),
        ("oi", "bi", "bo", ("i", "o")),
        ("hnd", "bnd", "bh", ("nd", "h")),
        ("hdn", "bnd", "bh", None),  # the data has them in another order
        ("io", "ib", "bo", None),  # not the last axis of the data
        ("io", "bi", "bio", None),  # multiplied without a sum
        ("io", "io", "", None),  # nothing is kept
        ("io", "bc", "bcio", None),  # nothing is contracted
        ("ii", "bi", "b", None),  # a diagonal
        ("i...", "bi", "b", None),
        ("io", "bbi", "bbo", None),  # a diagonal of the data
        ("io", "...i", "...o", ("i", "o")),
        ("io", "...bi", "...bo", ("i", "o")),
        ("io", "bi", "ob", None),
        ("io", "bci", "bo", None),  # a sum over c, too
    ],
)
def test_which_einsums_are_linear_layers(matrix: str, data: str, result: str, order: tuple[str, str] | None) -> None:
    assert _order(matrix, data, result) == order
