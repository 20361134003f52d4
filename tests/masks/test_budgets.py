from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.budgets import budget


@pytest.mark.parametrize(
    ("elements", "sparsity", "expected"),
    [(100, 0.9, 10), (1000, 0.99, 10), (10, 0.9, 1), (288, 0.75, 72), (7, 0.5, 3), (25_502_912, 0.9, 2_550_291)],
)
def test_rounds_down_what_the_fraction_means(elements: int, sparsity: float, expected: int) -> None:
    assert budget(elements, 1 - sparsity) == expected


@given(st.integers(1, 10**6), st.integers(0, 1000))
def test_exact_in_thousandths(elements: int, kept: int) -> None:
    assert budget(elements, 1 - (1000 - kept) / 1000) == elements * kept // 1000


@pytest.mark.parametrize(
    ("shape", "sparsity", "fan_in"), [((10, 10), 0.9, 1), ((100, 10), 0.9, 1), ((10, 50), 0.8, 10), ((4, 25), 0.92, 2)]
)
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_a_layer_gets_the_fan_in_that_its_sparsity_means(
    shape: tuple[int, int], sparsity: float, fan_in: int, distribution: Any
) -> None:
    """In floats each of these budgets falls just below a whole number: a fan-in one less, or none at all."""
    assert int(shape[0] * shape[1] * (1 - sparsity)) == shape[0] * fan_in - 1
    model = sx.sparsify(nn.Sequential(nn.Linear(shape[1], shape[0])), sparsity=sparsity, distribution=distribution)
    assert model.get_buffer("0.weight_mask").sum(1).tolist() == [fan_in] * shape[0]


def test_full_and_empty() -> None:
    assert (budget(7, 1.0), budget(7, 0.0), budget(0, 0.5), budget(10**12, 0.1)) == (7, 0, 0, 10**11)


@pytest.mark.parametrize(("elements", "density"), [(10, -0.1), (10, 1.1), (10, float("nan")), (-1, 0.5)])
def test_bad_arguments(elements: int, density: float) -> None:
    with pytest.raises(SparsifyError):
        budget(elements, density)
