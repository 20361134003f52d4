"""Fits of kept weights to the covariance of their inputs: against NumPy, and against every other choice of inputs."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from srigl_fx.masks.least_squares import (
    Part,
    damped,
    exchanged,
    fitted,
    least_squares,
    least_squares_reference,
)
from srigl_fx.masks.moments import Moments, pooled
from srigl_fx.masks.row_groups import RowGroups


def inputs(count: int, width: int, seed: int = 0, *, mean: float = 5.0) -> NDArray[np.float64]:
    """Correlated rows with means of their own."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width))
    return mixed + mean * rng.standard_normal(width)


def covariance(width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.cov(inputs(4 * width + 3, width, seed).T, bias=True).reshape(width, width))


def whole(rows: int, cov: Tensor, **grouped: int) -> tuple[list[Part], list[tuple[slice, RowGroups]]]:
    return [Part(0, rows, cov)], [(slice(0, rows), RowGroups(rows=rows, **grouped))]


@pytest.mark.parametrize("sizes", [(200,), (1, 199), (3, 0, 90, 107)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_all_rows(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(200, 7, mean=1e3)
    moments = Moments()
    for part in torch.split(torch.from_numpy(x).to(dtype), list(sizes)):
        moments.add(part)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-9
    assert moments.count == 200
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-6)
    scale = np.abs(np.cov(x.T, bias=True)).max()
    np.testing.assert_allclose(moments.covariance, np.cov(x.T, bias=True), atol=tolerance * scale * 10, rtol=0)


def test_moments_of_sixteen_bits_are_added_up_in_more() -> None:
    x = torch.from_numpy(inputs(300, 5)).to(torch.bfloat16)
    moments = Moments()
    for part in torch.split(x, 64):
        moments.add(part)
    expected = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_moments_of_parts_are_put_together() -> None:
    x = inputs(90, 4)
    parts = []
    for rows in np.split(x, [10, 55]):
        parts.append(Moments())
        parts[-1].add(torch.from_numpy(rows))
    count, mean, cov = pooled(parts)
    assert count == 90
    np.testing.assert_allclose(mean, x.mean(axis=0))
    np.testing.assert_allclose(cov, np.cov(x.T, bias=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_noticed(bad: float) -> None:
    moments = Moments()
    moments.add(torch.ones(3, 2))
    assert moments.finite
    moments.add(torch.tensor([[1.0, bad]]))
    assert not moments.finite


@pytest.mark.parametrize(("rows", "width", "density"), [(1, 1, 1.0), (5, 13, 0.3), (7, 9, 1.0), (40, 33, 0.1)])
def test_fits_are_those_of_the_reference(rows: int, width: int, density: float) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((rows, width))
    mask = rng.random((rows, width)) < density  # rows of unequal lengths, and empty ones
    cov = damped(covariance(width))
    found = least_squares(torch.from_numpy(weight), torch.from_numpy(mask), cov)
    np.testing.assert_allclose(found, least_squares_reference(weight, mask, cov.numpy()), rtol=1e-8, atol=1e-10)
    assert not found[~torch.from_numpy(mask)].any()


def test_many_rows_are_fitted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srigl_fx.masks.least_squares._CHUNK", 100)
    test_fits_are_those_of_the_reference(40, 33, 0.2)


def test_the_reference_is_that_of_numpy_for_the_inputs_themselves() -> None:
    x = inputs(100, 6)
    x -= x.mean(axis=0)
    weight, mask = np.ones((1, 6)), np.array([[True, False, True, True, False, False]])
    expected = np.linalg.lstsq(x[:, mask[0]], x @ weight[0])[0]
    found = least_squares_reference(weight, mask, np.cov(x.T, bias=True))
    np.testing.assert_allclose(found[0, mask[0]], expected)


@pytest.mark.parametrize("cov", [torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([0.0, 0, 1, 9]))])
def test_inputs_that_say_little_keep_weights_finite(cov: Tensor) -> None:
    weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, True, False]])
    found = least_squares(weight, mask, damped(cov.double()))
    assert found.isfinite().all()
    if not cov.any():
        assert torch.equal(found, (weight * mask).double())


def test_errors_are_expected_squares() -> None:
    cov, weight = covariance(8), torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.arange(8).expand(3, 8) < 4
    found = fitted(weight, mask, *whole(3, cov))
    missing = (weight - found.values).numpy()
    np.testing.assert_allclose(found.errors, np.einsum("nf,fg,ng->n", missing, cov, missing))
    assert torch.equal(found.mask, mask)


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_come_near_the_best_of_all_choices(seed: int) -> None:
    width, kept = 7, 3
    cov = covariance(width, seed) + 0.01 * torch.eye(width)
    weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)).double()

    def error(chosen: tuple[int, ...], rounds: int = 0) -> float:
        mask = torch.zeros(1, width, dtype=torch.bool)
        mask[0, list(chosen)] = True
        return float(fitted(weight, mask, *whole(1, cov), exchanges=rounds).errors)

    every = sorted((error(chosen), chosen) for chosen in itertools.combinations(range(width), kept))
    assert error(every[-1][1], 8) <= every[len(every) // 4][0]  # from the worst of all into the best quarter


@pytest.mark.parametrize("grouped", [{}, {"size": 4}, {"size": 2, "section": 7}, {"size": 2, "width": 4}])
def test_exchanges_keep_groups_and_fan_ins_and_never_lose(grouped: dict[str, int]) -> None:
    rows, width = 14, 24
    cov = damped(covariance(width))
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    groups = RowGroups(rows=rows, **grouped)
    columns = width // groups.width
    chosen = torch.rand(len(groups), columns, generator=torch.Generator().manual_seed(2)).argsort(dim=1) < columns // 3
    active = (torch.arange(rows) != 5) | (groups.width > 1)  # blocks are kept whole
    mask = groups.expand(chosen, active)
    before = fitted(weight, mask, *whole(rows, cov, **grouped))
    after = fitted(weight, mask, *whole(rows, cov, **grouped), exchanges=5)
    assert after.mask.sum(dim=1).tolist() == mask.sum(dim=1).tolist()
    assert not groups.fault(after.mask)
    assert not after.values[~after.mask].any()
    assert after.errors.sum() < 0.9 * before.errors.sum()
    changes = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, groups.index, after.errors - before.errors)
    assert (changes <= 1e-12).all()


def test_full_and_empty_rows_have_nothing_to_exchange() -> None:
    mask = torch.tensor([[True, True, True], [False, False, False]])
    scores = torch.ones(2, 3)
    assert torch.equal(exchanged(mask, scores, 9 * scores, RowGroups(rows=2), 1.0), mask)


def test_parts_have_covariances_of_their_own() -> None:
    one, other = damped(covariance(6)), damped(covariance(6, seed=3))
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6).expand(5, 6) < 3
    found = fitted(weight, mask, [Part(0, 2, one), Part(2, 5, other)], whole(5, one)[1])
    assert torch.equal(found.values[:2], least_squares(weight[:2], mask[:2], one))
    assert torch.equal(found.values[2:], least_squares(weight[2:], mask[2:], other))
