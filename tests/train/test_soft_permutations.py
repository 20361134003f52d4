"""The rules for one matrix that is to become a permutation, against the sentences of the paper taken literally."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from srigl_fx.train.soft_permutations import assignment, normalise, normalised_penalty, penalty


def literal_penalty(matrix: Tensor) -> float:
    """Entry by entry: of each row and each column, the sum of magnitudes less the root of the sum of squares."""
    size, total = len(matrix), 0.0
    for i in range(size):
        row = [abs(float(matrix[i, j])) for j in range(size)]
        column = [abs(float(matrix[j, i])) for j in range(size)]
        total += sum(row) - math.sqrt(sum(x * x for x in row))
        total += sum(column) - math.sqrt(sum(x * x for x in column))
    return total


def literal_normalise(matrix: Tensor) -> NDArray[np.float64]:
    """Clamp at zero, divide by column sums, then by row sums; sums of zero count as 1."""
    found: NDArray[np.float64] = np.maximum(matrix.double().numpy(), 0.0)
    size = len(found)
    for j in range(size):
        found[:, j] /= sum(found[:, j]) or 1.0
    for i in range(size):
        found[i] /= sum(found[i]) or 1.0
    return found


def matrices(size: int, seed: int, *, levels: int = 0, zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix * (torch.rand(size, size, generator=generator) >= zeros)
    return (matrix * levels).round() / levels if levels else matrix


sizes, seeds = st.integers(2, 9), st.integers(0, 1000)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds, st.sampled_from([0.0, 0.5, 0.95]))
def test_penalty_and_normalisation_are_the_papers(size: int, seed: int, zeros: float) -> None:
    matrix = matrices(size, seed, zeros=zeros)
    assert float(penalty(matrix)) == pytest.approx(literal_penalty(matrix), abs=1e-12)
    np.testing.assert_allclose(normalise(matrix).numpy(), literal_normalise(matrix), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [2, 3, 10, 64])
def test_the_penalty_of_permutations_is_zero_and_of_equal_entries_one(size: int) -> None:
    shuffled = torch.eye(size)[torch.randperm(size)]
    assert float(penalty(shuffled)) == 0
    assert normalised_penalty(shuffled) == 0
    assert normalised_penalty(torch.full((size, size), 1 / size)) == pytest.approx(1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(sizes, seeds)
def test_nothing_else_that_is_doubly_stochastic_has_no_penalty(size: int, seed: int) -> None:
    matrix = matrices(size, seed).abs()
    for _ in range(300):
        matrix = normalise(matrix)
    torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-2)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 1e-3 < normalised_penalty(matrix) < 1


def test_the_penalty_has_the_gradient_of_its_formula_and_a_finite_one_of_zeros() -> None:
    matrix = matrices(4, 3).abs().requires_grad_()
    assert torch.autograd.gradcheck(penalty, (matrix,))
    empty = torch.zeros(3, 3, requires_grad=True)
    penalty(empty).backward()
    assert empty.grad is not None
    assert bool(empty.grad.isfinite().all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), seeds, st.sampled_from([0, 1, 3]))
def test_the_assignment_is_a_bijection_with_the_largest_sum(size: int, seed: int, levels: int) -> None:
    matrix = matrices(size, seed, levels=levels)
    order = assignment(matrix)
    assert sorted(order.tolist()) == list(range(size))
    rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    best = float(matrix[torch.from_numpy(rows), torch.from_numpy(columns)].sum())
    assert float(matrix[torch.arange(size), order].sum()) == pytest.approx(best, abs=1e-12)


def test_rows_whose_largest_entries_share_a_column_still_get_one_each() -> None:
    matrix = torch.tensor([[0.9, 0.8, 0.0], [0.9, 0.1, 0.0], [0.9, 0.0, 0.1]])
    assert matrix.argmax(1).tolist() == [0, 0, 0]
    assert assignment(matrix).tolist() == [1, 0, 2]


def test_of_equal_entries_the_assignment_is_always_the_same() -> None:
    assert assignment(torch.ones(5, 5)).tolist() == [0, 1, 2, 3, 4]
