"""Selection by a level: against a stable sort on layers large enough to be guessed, searched and cut up."""

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from srigl_fx.train.selection import Scores, top, top_of_rows
from srigl_fx.train.updates import srigl_update


def ranked(values: Tensor, among: Tensor) -> Tensor:
    """Magnitudes as float64 with -1 off ``among``: what the scores order, computed by other means."""
    magnitude = values.double().abs()
    magnitude[~magnitude.isfinite()] = 0
    return magnitude.masked_fill(~among, -1)


def sorted_top(scores: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return chosen.reshape(scores.shape) & (scores >= 0)


def layer(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    match kind:
        case "smooth":
            pass
        case "three values":
            values = values.sign() * (values.abs() > 1) * 0.5
        case "equal":
            values = torch.full_like(values, 0.25)
        case "zeros":
            values = torch.zeros_like(values)
        case "mostly zeros":
            values *= torch.rand(rows, columns, generator=generator) < 0.01
        case "one hot row":
            values[rows // 2] *= 1000
        case "unlike rows":
            values *= torch.logspace(-6, 6, rows, dtype=torch.float64)[:, None]
        case "unlike columns":
            values *= torch.logspace(-6, 6, columns, dtype=torch.float64)
        case "special":
            values[torch.rand(rows, columns, generator=generator) < 0.3] = torch.inf
            values[torch.rand(rows, columns, generator=generator) < 0.3] = torch.nan
    return values.to(dtype)


KINDS = [
    "smooth",
    "three values",
    "equal",
    "zeros",
    "mostly zeros",
    "one hot row",
    "unlike rows",
    "unlike columns",
    "special",
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_of_a_large_layer(kind: str, dtype: torch.dtype) -> None:
    values = layer(kind, 331, 768, dtype)
    among = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    for allowed in (torch.ones_like(among), among):
        scores, expected = Scores(values, allowed), ranked(values, allowed)
        for count in (0, 1, 40, 20_000, 127_000, values.numel() - 1, values.numel()):
            assert torch.equal(top(scores, count), sorted_top(expected, count)), count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_of_rows_of_a_large_layer(kind: str, dtype: torch.dtype) -> None:
    values = layer(kind, 331, 768, dtype)
    generator = torch.Generator().manual_seed(1)
    among = torch.rand(values.shape, generator=generator) < 0.5
    counts = torch.randint(0, 300, (331,), generator=generator)
    found = top_of_rows(Scores(values, among), counts)
    order = ranked(values, among).sort(dim=1, descending=True, stable=True).indices
    expected = torch.zeros_like(among).scatter(1, order, torch.arange(768) < counts[:, None])
    assert torch.equal(found, expected)


def test_a_transposed_matrix() -> None:
    values = layer("smooth", 768, 331, torch.float32).t()
    everywhere = torch.ones(331, 768, dtype=torch.bool)
    expected = ranked(values, everywhere)
    assert torch.equal(top(Scores(values), 5000), sorted_top(expected, 5000))
    rows = top_of_rows(Scores(values), torch.full((331,), 7))
    assert torch.equal(rows, expected >= expected.topk(7, dim=1).values[:, -1:])


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 300_000))
@settings(max_examples=30, deadline=None)
def test_top_with_many_ties(seed: int, levels: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels + 1, (300, 1000), generator=generator).float()
    expected = values.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = top(Scores(values), count)
    assert int(chosen.sum()) == min(count, values.numel())
    assert bool(chosen.flatten()[expected].all())


def test_none_below_the_least() -> None:
    values = torch.tensor([[0.0, 3.0], [torch.nan, -2.0]])
    assert top(Scores(values), 4, least=1).tolist() == [[False, True], [False, True]]
    assert top(Scores(values), 3).tolist() == [[True, True], [False, True]]


def test_infinite_values_count_where_asked() -> None:
    values = torch.tensor([[torch.inf, 1.0, -torch.inf, torch.nan]])
    assert top(Scores(values), 1).tolist() == [[False, True, False, False]]
    assert top(Scores(values, finite=False), 2).tolist() == [[True, False, True, False]]
    none = top_of_rows(Scores(values.expand(2, 4), finite=False), torch.tensor([0, 1]))
    assert none.tolist() == [[False] * 4, [True, False, False, False]]


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["smooth", "zeros", "three values"])
@pytest.mark.parametrize("revived", [False, True])
def test_working_memory_of_an_update(gradients: str, revived: bool) -> None:
    """At most two copies of the layer, counted at the allocators of torch and NumPy, also where all ties or shrinks."""
    rows, fan_in, k = 1536, 768, 76
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, fan_in, generator=generator).argsort(dim=1) < k
    if revived:  # fewer rows with a higher fan-in: all of them shrink when the others return
        mask[: rows // 2] = torch.rand(rows // 2, fan_in, generator=generator).argsort(dim=1) < 2 * k
        mask[rows // 2 :] = False
    weight = torch.randn(rows, fan_in, generator=generator) * mask
    grad = layer(gradients, rows, fan_in, torch.float32)
    grad[rows // 2 :] *= 50

    def update() -> None:
        srigl_update(weight, grad, mask, budget=rows * k, drop_fraction=0.3, ablation=0.3)

    update()
    tracemalloc.start()
    update()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    live = torch_peak = 0
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            torch_peak = max(torch_peak, live)
    assert torch_peak > mask.numel(), "the new mask alone takes that"
    assert torch_peak + numpy_peak <= 2 * weight.nbytes, (torch_peak / weight.nbytes, numpy_peak / weight.nbytes)
