"""What is constant in graphs that are written by hand: the rules about the number of samples, and about means."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channels_support import Builder
from liveness_support import Batched
from torch import Tensor, fx

from srigl_fx.passes.constness import Constant, _agreed, constants

aten = torch.ops.aten


def ones(b: Batched, *sizes: Any) -> fx.Node:
    return b.call(aten.new_ones.default, b.x, list(sizes))


# The fixed elements of the last node without its batch axes, as numbers; None for those that are not.
CASES: dict[str, tuple[Callable[[Batched], fx.Node], list[float | None]]] = {
    "rule 1: inputs are live": (lambda b: b.call(aten.sum.dim_IntList, b.x, [1, 2]), [None]),
    "rule 1: a constant for every sample": (
        lambda b: b.call(aten.expand.default, b.constant(torch.tensor([[1.0, 2.0]])), [b.size, 2]),
        [1.0, 2.0],
    ),
    "rule 5: a sum over samples": (lambda b: b.call(aten.sum.dim_IntList, ones(b, b.size, 2), [0]), [None]),
    "rule 5: a sum of zeros": (
        lambda b: b.call(
            aten.sum.dim_IntList,
            b.call(aten.mul.Tensor, ones(b, b.size, 2), b.constant(torch.tensor([0.0, 3.0]))),
            [0],
        ),
        [0.0, None],
    ),
    "rule 5: an operator that keeps no zeros": (
        lambda b: b.call(aten.logsumexp.default, b.call(aten.mul.Tensor, ones(b, b.size, 2), 0), [0]),
        [None],
    ),
    "rule 6: one sample unlike the others": (
        lambda b: b.call(aten.cat.default, [b.constant(torch.tensor([[1.0, 7.0]])), ones(b, b.size, 2)], 0),
        [1.0, None],
    ),
    "rule 6: one sample that is live": (
        lambda b: b.call(
            aten.cat.default,
            [b.call(aten.slice.Tensor, b.call(aten.select.int, b.x, 1, 0), 0, 0, 1), ones(b, b.size, 6)],
            0,
        ),
        [None],
    ),
    "rule 7: outer places that are alike": (
        lambda b: b.call(aten.reshape.default, ones(b, 3, b.size, 2), [-1, 2]),
        [1.0, 1.0],
    ),
    "rule 7: outer places that differ": (
        lambda b: b.call(
            aten.reshape.default,
            b.call(aten.mul.Tensor, ones(b, 2, b.size, 2), b.constant(torch.tensor([[[1.0, 4.0]], [[1.0, 5.0]]]))),
            [-1, 2],
        ),
        [1.0, None],
    ),
    "rule 7: inner places keep their period": (
        lambda b: b.call(
            aten.reshape.default,
            b.call(aten.mul.Tensor, ones(b, 2, b.size, 2), b.constant(torch.tensor([1.0, 4.0]))),
            [-1, 2],
        ),
        [1.0, 4.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_constant_for_any_number_of_samples(name: str) -> None:
    make, expected = CASES[name]
    b = Batched()
    node = make(b)
    found = constants(b.finish(node)).known.get(node)
    flat = [None] if found is None else found.value.flatten().tolist()
    fixed = [False] if found is None else found.fixed.flatten().tolist()
    assert [value if known else None for value, known in zip(flat, fixed, strict=True)] == expected


def soft(b: Builder, x: fx.Node, dim: int = -1) -> fx.Node:
    return b.call(aten.softmax.int, x, dim)


@pytest.mark.parametrize(
    ("weights", "known"),
    [
        (lambda b, x: soft(b, x), True),
        (lambda b, x: soft(b, x, 1), True),
        (lambda b, x: soft(b, x, 0), False),
        (lambda b, x: b.call(aten._softmax.default, x, 1, False), True),
        (lambda b, x: b.call(aten.clone.default, soft(b, x)), True),
        (lambda b, x: b.call(aten.expand.default, soft(b, x), [2, 3, 4]), True),
        (lambda b, x: b.call(aten._to_copy.default, soft(b, x), dtype=torch.float32), True),
        (lambda b, x: b.call(aten.reshape.default, soft(b, x), [1, 3, 4]), True),
        (lambda b, x: b.call(aten.reshape.default, soft(b, b.call(aten.reshape.default, x, [6, 2])), [3, 4]), False),
        (lambda b, x: b.call(aten.t.default, soft(b, b.call(aten.t.default, x))), False),
        (lambda b, x: b.call(aten.slice.Tensor, soft(b, b.call(aten.cat.default, [x, x], 1)), 1, 0, 4), False),
        (lambda b, x: b.call(aten.mul.Tensor, soft(b, x), 0.5), False),
        (lambda b, x: b.call(aten.sigmoid.default, x), False),
        (lambda b, x: x, False),
    ],
    ids=[
        "softmax", "of the last axis by number", "of another axis", "the inner operator", "copied", "expanded", "cast",
        "reshaped before its rows", "reshaped across its rows", "transposed", "cut", "scaled", "another function",
        "an input",
    ],
)  # fmt: skip
def test_rule_4_a_mean_of_equal_rows_is_that_row(weights: Callable[..., fx.Node], known: bool) -> None:
    b = Builder()
    x = b.input(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    rows = b.constant(torch.tensor([[2.0, 1.0]] * 3 + [[2.0, 5.0]]))
    node = b.call(aten.matmul.default, weights(b, x), rows)
    found = constants(b.finish(node)).known.get(node)
    assert (found is not None) == known
    if found is not None:
        assert bool(found.fixed[..., 0].all())
        assert not bool(found.fixed[..., 1].any())
        assert [*{*found.value[..., 0].flatten().tolist()}] == pytest.approx([2.0])


def constant(value: list[float], fixed: list[bool]) -> Constant:
    return Constant(fixed=torch.tensor(fixed), value=torch.tensor(value))


def test_rule_8_what_agrees_at_two_sizes() -> None:
    one = constant([1.0, 2.0, 3.0, 0.0, torch.inf], [True, True, True, False, True])
    other = constant([1.0 + 1e-6, 2.1, 0.0, 4.0, torch.inf], [True, True, False, True, True])
    agreed = _agreed(one, other)
    assert agreed is not None
    assert agreed.fixed.tolist() == [True, False, False, False, False]  # what is not finite is not told apart
    assert agreed.value.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert _agreed(one, constant([1.0], [True])) is None
    assert _agreed(constant([1.0], [True]), constant([2.0], [True])) is None
    whole: Tensor = torch.tensor([100000])
    fixed = torch.tensor([True])
    assert _agreed(Constant(fixed=fixed, value=whole), Constant(fixed=fixed, value=whole + 1)) is None


def test_only_operators_with_a_constant_are_told_of_and_notes_name_the_first_place() -> None:
    b = Builder()
    x = b.input(torch.ones(2, 3))
    one, two = (b.call(aten.sort.stable, x, stable=True, dim=1) for _ in range(2))
    program = b.finish(one, two, b.call(aten.cdist.default, x, x), b.call(aten.cdist.default, x, x))
    found = constants(program)
    assert found.known == {}
    assert [(note.where, note.reason.split(" ")[0]) for note in found.notes] == [("cdist_default", "aten.cdist")]


def test_a_buffer_that_is_written_is_live_under_all_its_names() -> None:
    b = Builder()
    x = b.input(torch.ones(3))
    state = b.constant(torch.zeros(3), "state")
    b.module.register_buffer("same", b.module.get_buffer("state"))
    again = b.module.graph.get_attr("same")
    again.meta["val"] = b.module.get_buffer("state")
    other = b.constant(torch.zeros(3), "other")
    read, untouched = b.call(aten.add.Tensor, again, 1), b.call(aten.add.Tensor, other, 1)
    write = b.module.graph.call_function(aten.copy_.default, (state, x))
    write.meta["val"] = torch.ones(3)
    found = constants(b.finish(read, untouched, write)).known
    assert set(found) == {untouched}
    assert not bool(b.module.get_buffer("state").any())
