import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srigl_fx.train.schedules import (
    captures_gradient,
    cosine_drop_fraction,
    cubic_sparsity,
    default_interval,
    end_step,
    is_update_step,
    last_update_step,
)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.3), (250, 0.25607), (500, 0.15), (1000, 0.0), (2000, 0.0)])
def test_cosine_vectors(step: int, expected: float) -> None:
    assert cosine_drop_fraction(step, initial=0.3, end=1000) == pytest.approx(expected, abs=5e-6)


def test_cosine_just_before_the_end() -> None:
    assert cosine_drop_fraction(999, initial=0.3, end=1000) == pytest.approx(7.4e-7, rel=1e-2)


@given(st.integers(1, 5000), st.floats(1e-6, 1))
def test_cosine_falls_from_its_start_to_zero(end: int, initial: float) -> None:
    values = [cosine_drop_fraction(step, initial=initial, end=end) for step in range(0, end + 1, max(1, end // 50))]
    assert values[0] == initial
    assert all(a >= b >= 0 for a, b in itertools.pairwise(values))
    assert cosine_drop_fraction(end, initial=initial, end=end) == 0


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_cubic_rises_from_its_start_to_its_end(end: int, one: float, other: float) -> None:
    initial, final = sorted((one, other))
    steps = range(0, end + 1, max(1, end // 50))
    values = [cubic_sparsity(step, final=final, end=end, initial=initial) for step in (*steps, end)]
    assert values[0] == pytest.approx(initial)
    assert values[-1] == final
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_cubic_vectors() -> None:
    assert cubic_sparsity(50, final=0.8, end=100) == pytest.approx(0.8 * (1 - 0.125))
    assert cubic_sparsity(20, final=0.9, end=100, initial=0.5) == pytest.approx(0.9 - 0.4 * 0.512)


@given(st.integers(1, 20), st.integers(0, 200))
def test_the_last_update(every: int, end: int) -> None:
    updates = [step for step in range(end + 1) if is_update_step(step, every=every, end=end)]
    assert last_update_step(every=every, end=end) == max(updates, default=0)


def test_updates_at_multiples_strictly_between() -> None:
    assert [t for t in range(20) if is_update_step(t, every=5, end=15)] == [5, 10]
    assert not any(is_update_step(t, every=5, end=0) for t in range(20))


@pytest.mark.parametrize(
    ("total", "stop_at", "expected"), [(1000, 0.75, 750), (10, 0.7, 7), (100, 0.29, 29), (7, 0.5, 3)]
)
def test_end_step(total: int, stop_at: float, expected: int) -> None:
    assert end_step(total, stop_at) == expected


@given(st.integers(1, 20), st.integers(0, 100), st.integers(1, 20))
def test_the_window_is_what_leads_to_an_update(every: int, end: int, samples: int) -> None:
    for step in range(120):
        following = [t for t in range(step + 1, step + samples + 1) if is_update_step(t, every=every, end=end)]
        first = min((t for t in range(step + 1, step + every + 1) if t % every == 0), default=math.inf)
        expected = first < end and first in following
        assert captures_gradient(step, every=every, end=end, samples=samples) == expected


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, 1),
        (3, 1),
        (8, 1),
        (40, 5),
        (60, 7),
        (80, 10),
        (1000, 10),
        (3200, 10),
        (6400, 20),
        (32_000, 100),
        (256_000, 800),
    ],
)
def test_the_default_interval(total: int, expected: int) -> None:
    """RigL's recipe has 100 of 32,000 steps, and the ResNet-50 of SRigL's experiments 800 of 256,000."""
    assert default_interval(total, end=end_step(total, 0.75)) == expected


@given(st.integers(1, 100_000), st.floats(0, 1), st.integers(1, 50))
def test_the_default_interval_gives_every_run_an_update_that_can_have_one(
    total: int, stop: float, samples: int
) -> None:
    end = end_step(total, stop)
    every = default_interval(total, end=end, samples=samples)
    assert every >= 1
    assert (last_update_step(every=every, end=end) > 0) == (end >= 2)
