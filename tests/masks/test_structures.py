import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srigl_fx.errors import StructureError
from srigl_fx.masks.records import Structure
from srigl_fx.masks.structures import MaskInit, initial_mask


def draw(
    weight: torch.Tensor, structure: Structure, budget: int, init: MaskInit = "random", seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return initial_mask(weight, structure=structure, budget=budget, init=init, generator=generator)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_exactly_the_budget(rows: int, fan_in: int, data: st.DataObject) -> None:
    weight = torch.randn(rows, fan_in, generator=torch.Generator().manual_seed(1))
    init: MaskInit = data.draw(st.sampled_from(["magnitude", "random"]))
    budget = data.draw(st.integers(rows, rows * fan_in))
    mask = draw(weight, "constant_fan_in", budget, init)
    assert mask.sum(dim=1).tolist() == [budget // rows] * rows
    mask = draw(weight, "unstructured", budget, init)
    assert (mask.dtype, int(mask.sum())) == (torch.bool, budget)


def test_magnitude_takes_the_largest_and_breaks_ties_by_index() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 0.5], [0.1, 2.0, -3.0, 2.0]])
    assert draw(weight, "constant_fan_in", 4, "magnitude").int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert draw(weight, "unstructured", 4, "magnitude").int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_random_depends_on_the_seed_alone() -> None:
    weight = torch.randn(8, 32)
    first = draw(weight, "constant_fan_in", 64)
    assert torch.equal(first, draw(-2 * weight, "constant_fan_in", 64))
    assert not torch.equal(first, draw(weight, "constant_fan_in", 64, seed=1))


def test_random_is_uniform_over_columns() -> None:
    hits = torch.stack([draw(torch.ones(16, 8), "constant_fan_in", 32, seed=seed) for seed in range(200)]).sum((0, 1))
    expected = 200 * 16 * 2 / 8
    assert (hits - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("structure", ["constant_fan_in", "unstructured"])
def test_a_budget_too_small_is_an_error(structure: Structure) -> None:
    with pytest.raises(StructureError, match="fan-in of 0"):
        draw(torch.ones(10, 10), structure, 9 if structure == "constant_fan_in" else 0)


def test_wrong_arguments() -> None:
    with pytest.raises(StructureError, match="matrix"):
        draw(torch.ones(2, 2, 2), "constant_fan_in", 4)
    with pytest.raises(StructureError, match="choose"):
        draw(torch.ones(2, 2), "blocks", 4)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="choose"):
        draw(torch.ones(2, 2), "unstructured", 4, "large")  # type: ignore[arg-type]
