import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(("elements", "density"), [(10, -0.1), (10, 1.1), (10, float("nan")), (-1, 0.5)])
def test_bad_arguments(elements: int, density: float) -> None:
    with pytest.raises(SparsifyError):
        budget(elements, density)
