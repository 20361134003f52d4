"""The arithmetic of eight bits in NumPy, against a literal reading of it in fractions, number by number."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srigl_fx.runtime import reference
from srigl_fx.runtime.quantisation import (
    LARGEST_FAN_IN,
    SMALLEST,
    given_problem,
    given_scale,
    quantise_samples,
    quantise_weights,
    round_with,
    sums,
)

HALF = Fraction(1, 2)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Numbers of like size, many of them between two whole numbers of the larger ones' scale.
near_ties = st.builds(lambda n, exponent: n * 2.0**exponent, st.integers(-510, 510), st.sampled_from([-100, -1, 0, 60]))
rows = st.lists(finite, max_size=9) | st.lists(st.floats(-4, 4, width=32), max_size=9)
rows |= st.lists(st.integers(-510, 510).map(lambda n: n / 2), max_size=9) | st.lists(near_ties, max_size=9)


def float32(number: Fraction) -> Fraction:
    """The nearest float32, of two the even one; the number must not be too large for one."""
    if not number:
        return number
    exponent = math.floor(math.log2(abs(number.numerator)) - math.log2(number.denominator))
    while abs(number) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(number) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(number / unit) * unit


def literal_sample(row: list[float]) -> tuple[list[int], Fraction, int]:
    """Rounded numbers, the scale and the offset of a finite sample."""
    numbers = [Fraction(x) for x in row]
    negative = any(x < 0 for x in numbers)
    limit, offset = (127, 128) if negative else (255, 0)
    largest = max((abs(x) for x in numbers), default=Fraction(0))
    if largest < Fraction(2) ** -100:
        return [offset] * len(row), Fraction(0), offset
    inverse = float32(limit / largest)
    return [round(float32(x * inverse)) + offset for x in numbers], float32(largest / limit), offset


def literal_weights(row: list[float]) -> tuple[list[int], Fraction]:
    """Rounded weights of a row, and their scale."""
    numbers = [Fraction(w) for w in row]
    largest = max((abs(w) for w in numbers), default=Fraction(0))
    if largest < Fraction(2) ** -100:
        return [0] * len(row), Fraction(0)
    scale = float32(largest / 127)
    return [max(-127, min(127, round(w / scale))) for w in numbers], scale


def array(row: list[float]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.array([row], np.float32).reshape(1, len(row))


@given(number=st.floats(-3e38, 3e38))
@settings(max_examples=50)
def test_the_literal_rounding_is_that_of_the_processor(number: float) -> None:
    assert float32(Fraction(number)) == Fraction(float(np.float32(number)))


@given(row=rows)
def test_samples(row: list[float]) -> None:
    rounded, scales, offsets = quantise_samples(array(row))
    assert [part.dtype.name for part in (rounded, scales, offsets)] == ["uint8", "float32", "int32"]
    expected, scale, offset = literal_sample(row)
    assert rounded[0].tolist() == expected
    assert (Fraction(float(scales[0])), offsets[0]) == (scale, offset)


@given(row=rows)
def test_a_sample_is_half_a_step_from_what_it_was(row: list[float]) -> None:
    rounded, scales, offsets = quantise_samples(array(row))
    scale = Fraction(float(scales[0]))
    steps = [int(r) - int(offsets[0]) for r in rounded[0]]
    assert all(-127 <= step <= 127 if offsets[0] else 0 <= step <= 255 for step in steps)
    for x, step in zip(row, steps, strict=True):
        allowed = scale * (HALF + Fraction(1, 20_000)) if scale else Fraction(SMALLEST)
        assert abs(Fraction(x) - scale * step) <= allowed
    if scale:
        assert max(map(abs, steps)) == (127 if offsets[0] else 255)


@given(row=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), exponent=st.integers(-60, 100))
def test_powers_of_two_change_only_the_scale(row: list[float], exponent: int) -> None:
    row = [x if abs(x) > 1e-6 else 0.0 for x in [*row, 1.0]]
    rounded, scales, offsets = quantise_samples(array(row))
    again, scaled, same = quantise_samples(array([x * 2.0**exponent for x in row]))
    assert np.array_equal(again, rounded)
    assert np.array_equal(same, offsets)
    assert scaled[0] == scales[0] * 2.0**exponent


@given(row=st.lists(finite, min_size=1, max_size=9))
def test_a_sample_and_its_negative_are_rounded_alike(row: list[float]) -> None:
    row = [*row, -row[0]] if row[0] else [1.0, -1.0]
    rounded, scales, _ = quantise_samples(array(row))
    negative, same, _ = quantise_samples(-array(row))
    assert np.array_equal(128 - rounded.astype(int), negative.astype(int) - 128)
    assert np.array_equal(scales, same)


@given(row=rows, special=st.sampled_from([math.nan, math.inf, -math.inf]), place=st.integers(0, 9))
def test_what_is_not_finite_leaves_nothing_known(row: list[float], special: float, place: int) -> None:
    batch = np.zeros((3, len(row) + 1), np.float32)
    batch[0, 1:] = batch[2, 1:] = row
    alone = quantise_samples(batch[:1])
    batch[1, 1:] = row
    batch[1, place % batch.shape[1]] = special
    rounded, scales, offsets = quantise_samples(batch)
    assert np.isnan(scales).tolist() == [False, True, False]
    for neighbour in (0, 2):
        for mine, theirs in zip((rounded, scales, offsets), alone, strict=True):
            assert np.array_equal(mine[neighbour], theirs[0])


@given(row=rows, scale=st.floats(2.0**-20, 2.0**20, width=32), offset=st.sampled_from([0, 128]))
def test_a_given_scale(row: list[float], scale: float, offset: int) -> None:
    rounded = round_with(array(row), scale, offset)
    inverse = float32(1 / Fraction(scale))
    for x, step in zip(row, rounded[0].tolist(), strict=True):
        product = Fraction(x) * inverse
        whole = round(float32(product)) if abs(product) < 1000 else math.copysign(1000, x)
        assert step == min(max(whole + offset, 0), 255)


@given(row=rows)
def test_the_scale_of_a_sample_is_the_one_to_give(row: list[float]) -> None:
    _, (scale,), (offset,) = quantise_samples(array(row))
    if scale:
        assert given_scale(max(map(abs, row)), min(row) < 0) == (float(scale), offset)


@pytest.mark.parametrize(("offset", "expected"), [(0, [0, 0, 255, 0, 0, 255]), (128, [128, 0, 255, 128, 126, 255])])
def test_a_given_scale_clips_and_a_nan_is_zero(offset: int, expected: list[int]) -> None:
    x = np.array([math.nan, -math.inf, math.inf, -0.0, -1.25, 3e38], np.float32)
    assert round_with(x, 0.5, offset).tolist() == expected


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-31, 1e39])
def test_scales_that_do_not_round(scale: float) -> None:
    assert given_problem(scale, 0) == f"scale must be a finite number of at least 2**-100, not {scale}"
    assert given_problem(SMALLEST, 1) == "offset must be 0 or 128, not 1"
    assert given_problem(SMALLEST, 0) == given_problem(3e38, 128) == ""


@given(row=rows)
def test_weights(row: list[float]) -> None:
    rounded, scales = quantise_weights(array(row))
    assert [part.dtype.name for part in (rounded, scales)] == ["int8", "float32"]
    expected, scale = literal_weights(row)
    assert rounded[0].tolist() == expected
    assert Fraction(float(scales[0])) == scale
    for weight, value in zip(row, expected, strict=True):
        allowed = scale * (HALF + Fraction(1, 100_000)) if scale else Fraction(SMALLEST)
        assert abs(Fraction(weight) - scale * value) <= allowed


@pytest.mark.long
@given(seed=st.integers(0, 1000), batch=st.integers(0, 4), n=st.integers(1, 4), features=st.integers(1, 6))
def test_sums(seed: int, batch: int, n: int, features: int) -> None:
    rng = np.random.default_rng(seed)
    rounded = rng.integers(0, 256, (batch, features)).astype(np.uint8)
    weight = rng.integers(-127, 128, (n, features)).astype(np.int8)
    offsets = (128 * rng.integers(0, 2, batch)).astype(np.int32)
    expected = [
        [sum(int(weight[o, f]) * (int(rounded[s, f]) - int(offsets[s])) for f in range(features)) for o in range(n)]
        for s in range(batch)
    ]
    assert sums(rounded, offsets, weight).tolist() == expected


@given(
    x=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    weights=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    bias=st.floats(-4, 4, width=32),
)
def test_a_product_by_the_reference(x: list[float], weights: list[float], bias: float) -> None:
    """Both scales multiplied and rounded, times the exact sum, plus the bias, rounded once at the end."""
    values, scales = quantise_weights(array(weights))
    indices, active = np.array([[0, 1, 2]], np.uint16), np.array([0], np.int32)
    y = reference.condensed_linear(array(x), values, indices, active, np.array([bias], np.float32), scales=scales)
    steps, of_sample, offset = literal_sample(x)
    rounded, of_row = literal_weights(weights)
    exact = sum(value * (step - offset) for value, step in zip(rounded, steps, strict=True))
    expected = float32(exact * float32(of_sample * of_row) + Fraction(bias))
    assert abs(Fraction(float(y[0, 0])) - expected) <= abs(expected) / 2**23


def test_the_largest_fan_in() -> None:
    """Sums of any values, -128 too, are int32 up to there; one more weight, and they may not be."""
    for value in (127, -127, -128):
        assert -(2**31) <= LARGEST_FAN_IN * 255 * value < 2**31
    assert (LARGEST_FAN_IN + 1) * 255 * 128 >= 2**31


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 3, 4, 5), (1, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    rounded, scales, offsets = quantise_samples(np.ones(shape, np.float32))
    assert (rounded.shape, scales.shape, offsets.shape) == (shape, shape[:1], shape[:1])
    assert (rounded == 255).all()
