"""The condensed format: built from the mask, expanded back, and strict about what it accepts."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_support import fan_in_mask, random_condensed

from srigl_fx.errors import FormatError
from srigl_fx.runtime.format import VALUE_DTYPES, CondensedWeight, ValueDtype, is_padding, padding_problem
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN
from srigl_fx.runtime.value_types import FLOATS


def test_hand_computed() -> None:
    weight = np.array([[0, 0.9, 0, 0.8], [0, 0, 0, 0], [0.6, 0, 0.7, 0]])
    condensed = CondensedWeight.from_dense(weight, weight != 0, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(condensed.values, np.array([[0.9, 0.8], [0.6, 0.7]], np.float32))
    np.testing.assert_array_equal(condensed.indices, np.array([[1, 3], [0, 2]], np.uint16))
    np.testing.assert_array_equal(condensed.active, np.array([0, 2], np.int32))
    np.testing.assert_array_equal(condensed.bias, np.array([1, 2, 3], np.float32))
    assert (condensed.out_features, condensed.in_features, condensed.n_active, condensed.k) == (3, 4, 2, 2)
    assert condensed.nbytes == 4 * 4 + 4 * 2 + 2 * 4 + 3 * 4


def test_a_live_weight_may_be_zero() -> None:
    mask = np.array([[True, True, False], [False, True, True]])
    weight = np.array([[0.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    condensed = CondensedWeight.from_dense(weight, mask)
    assert condensed.n_active == 2
    np.testing.assert_array_equal(condensed.indices, [[0, 1], [1, 2]])
    np.testing.assert_array_equal(condensed.to_dense()[1], mask)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 20),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_round_trip(rows: int, columns: int, data: st.DataObject, seed: int) -> None:
    k, ablated = data.draw(st.integers(1, columns)), data.draw(st.integers(0, rows))
    mask = fan_in_mask(rows, columns, k, ablated, seed)
    weight = np.random.default_rng(seed).standard_normal(mask.shape).astype(np.float32) * mask
    condensed = CondensedWeight.from_dense(weight, mask)
    condensed.check()
    assert condensed.n_active == rows - ablated
    back, mask_back = condensed.to_dense()
    np.testing.assert_array_equal(back, weight)
    np.testing.assert_array_equal(mask_back, mask)


@pytest.mark.parametrize(("columns", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_index_dtype_holds_the_last_column(columns: int, dtype: type) -> None:
    mask = np.zeros((1, columns), np.bool_)
    mask[0, -1] = True
    condensed = CondensedWeight.from_dense(2.0 * mask, mask)
    assert condensed.indices.dtype == dtype
    assert condensed.indices[0, 0] == columns - 1


def test_unequal_rows_are_refused() -> None:
    mask = np.array([[True, True], [False, False], [True, False]])
    with pytest.raises(FormatError, match="row 0 keeps 2 weights but row 2 keeps 1"):
        CondensedWeight.from_dense(np.ones((3, 2)), mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_shorter_rows_are_padded(dtype: ValueDtype) -> None:
    mask = np.array([[True, False, True, True], [False] * 4, [False, True, False, False], [True, False, False, True]])
    weight = np.arange(-1.0, 15.0).reshape(4, 4) * mask
    condensed = CondensedWeight.from_dense(weight, mask, dtype=dtype, pad=True)
    assert condensed.indices.tolist() == [[0, 2, 3], [1, 1, 1], [0, 3, 3]]
    assert condensed.values.astype(np.float32).tolist() == [[-1, 1, 2], [8, 0, 0], [11, 14, 0]]
    assert is_padding(condensed.indices).sum() == 3
    back, mask_back = condensed.to_dense()
    assert np.array_equal(back, weight)
    assert np.array_equal(mask_back, mask)


def test_rows_of_eight_bits() -> None:
    mask = np.array([[True, False, True, True], [False] * 4, [False, True, False, False], [True, False, False, True]])
    weight = np.array([[-1, 9, 1, 2], [9] * 4, [9, -8, 9, 9], [0, 9, 9, 0.0]])
    condensed = CondensedWeight.from_dense(weight, mask, dtype="int8", pad=True)
    assert condensed.values.tolist() == [[-64, 64, 127], [-127, 0, 0], [0, 0, 0]]  # 63.5 is rounded to even
    assert condensed.scales is not None
    assert condensed.scales.tolist() == [np.float32(2) / np.float32(127), np.float32(8) / np.float32(127), 0]
    back, mask_back = condensed.to_dense()
    assert np.array_equal(mask_back, mask)
    assert np.abs(back - weight * mask).max() <= 2 / 127 / 2 + 1e-7
    assert condensed.nbytes == 9 * (1 + 2) + 3 * 4 + 4 * 4 + 3 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "values of int8, and no others, have scales"),
        ({"values": np.ones((3, 2), np.float32)}, "values of int8, and no others, have scales"),
        ({"scales": np.ones(3)}, "scales must be a float32 array, not float64"),
        ({"scales": [1.0, 1.0, 1.0]}, "scales must be a float32 array, not <class 'list'>"),
        ({"scales": np.ones(4, np.float32)}, r"scales have shape \(4,\) for 3 active rows"),
        ({"scales": np.array([1, -1, 1], np.float32)}, "scales must be finite, and none negative"),
        ({"scales": np.array([1, np.nan, 1], np.float32)}, "scales must be finite, and none negative"),
        ({"scales": np.array([1, 1, np.inf], np.float32)}, "scales must be finite, and none negative"),
    ],
)
def test_check_names_malformed_scales(change: dict[str, Any], message: str) -> None:
    dense, mask = random_condensed(4, 6, 2, ablated=1).to_dense()
    condensed = CondensedWeight.from_dense(dense, mask, dtype="int8")
    condensed.check()
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(condensed, **change).check()


def test_sums_of_eight_bits_are_int32() -> None:
    mask = np.ones((1, LARGEST_FAN_IN + 1), np.bool_)
    CondensedWeight.from_dense(1.0 * mask[:, 1:], mask[:, 1:], dtype="int8")
    with pytest.raises(FormatError, match=rf"too large for sums of int32 \(largest with int8: {LARGEST_FAN_IN}\)"):
        CondensedWeight.from_dense(1.0 * mask, mask, dtype="int8")


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_value_of_eight_bits(special: float) -> None:
    weight = np.array([[1.0, special, 2.0]])
    with pytest.raises(FormatError, match="not finite has no value of eight bits; store the values in float32"):
        CondensedWeight.from_dense(weight, np.ones((1, 3), np.bool_), dtype="int8")
    CondensedWeight.from_dense(weight, np.array([[True, False, True]]), dtype="int8").check()


@pytest.mark.parametrize("mask", [np.ones((2, 3)), np.ones((3, 2), np.bool_), np.ones(6, np.bool_)])
def test_unfit_masks_are_refused(mask: Any) -> None:
    with pytest.raises(FormatError, match="matrix view"):
        CondensedWeight.from_dense(np.ones((2, 3)), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.ones((3, 2))}, "values must be a 2-D float32"),
        ({"indices": np.ones((3, 2), np.int64)}, "indices must be a 2-D uint16 or int32"),
        ({"indices": np.ones((3, 3), np.int32)}, "differ in shape"),
        ({"indices": np.array([[0, 6], [0, 1], [0, 1]], np.int32)}, "index of 6 is not in 0..5"),
        ({"indices": np.array([[-1, 5], [0, 1], [0, 1]], np.int32)}, "index of -1 is not in 0..5"),
        ({"indices": np.array([[1, 1], [0, 1], [0, 1]], np.int32)}, "not ascending: only zeros at its end"),
        ({"indices": np.array([[1, 0], [0, 1], [0, 1]], np.int32)}, "not ascending"),
        (
            {"values": np.zeros((3, 3), np.float32), "indices": np.array([[1, 1, 2], [0, 1, 2], [0, 1, 2]], np.int32)},
            "not ascending",
        ),
        ({"active": np.array([0, 1, 4], np.int32)}, "active row of 4 is not in 0..3"),
        ({"active": np.array([0, 2, 1], np.int32)}, "active rows are not ascending"),
        ({"active": np.array([0, 1], np.int32)}, "for 3 active rows"),
        ({"bias": np.zeros(3, np.float32)}, "bias has shape"),
        ({"values": np.ones((3, 0), np.float32), "indices": np.ones((3, 0), np.int32)}, "fan-in of 0"),
        ({"bias": None}, "bias must be"),
    ],
)
def test_check_names_what_is_malformed(change: dict[str, Any], message: str) -> None:
    condensed = random_condensed(4, 6, 2, ablated=1)
    condensed.check()
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(condensed, **change).check()


def test_all_rows_ablated() -> None:
    condensed = CondensedWeight.from_dense(np.zeros((3, 4)), np.zeros((3, 4), np.bool_), np.ones(3))
    condensed.check()
    assert (condensed.n_active, condensed.k) == (0, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_rounded_to_the_nearest_as_torch_does(dtype: ValueDtype) -> None:
    mask = fan_in_mask(9, 40, 11, 2)
    weight = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32) * mask
    condensed = CondensedWeight.from_dense(weight, mask, dtype=dtype)
    condensed.check()
    assert condensed.values.dtype == VALUE_DTYPES[dtype]
    rounded, mask_back = condensed.to_dense()
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, torch.from_numpy(weight).to(getattr(torch, dtype)).float().numpy())
    np.testing.assert_array_equal(mask_back, mask)
    values = 4 if dtype == "float32" else 2
    assert condensed.nbytes == 7 * 11 * (values + 2) + 7 * 4 + 9 * 4


def test_a_weight_too_large_for_float16_is_refused() -> None:
    weight = np.array([[1.0, -7e4], [3e5, np.inf]])
    with pytest.raises(FormatError, match=r"a weight of 3e\+05 is too large for float16 \(largest: 65504\).*bfloat16"):
        CondensedWeight.from_dense(weight, np.ones((2, 2), np.bool_), dtype="float16")
    kept = CondensedWeight.from_dense(weight, np.ones((2, 2), np.bool_), dtype="bfloat16")
    assert kept.values.astype(np.float32)[1, 1] == np.inf
    CondensedWeight.from_dense(weight, np.array([[True, False], [False, True]]), dtype="float16").check()


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(FormatError, match="float32, bfloat16, float16, int8, not in float64"):
        CondensedWeight.from_dense(np.ones((2, 2)), np.ones((2, 2), np.bool_), dtype="float64")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "width", "value_bytes", "refused"),
    [
        ([3, 3, 0], 4, 4, False),  # equal rows are a constant fan-in, however many they keep
        ([0, 0], 4, 4, False),
        ([], 4, 4, False),
        ([1, 65], 100, 4, False),  # 2 * 65 * (4 + 2) = 780 bytes of 800
        ([1, 67], 100, 4, True),  # 804
        ([1, 0, 67], 100, 4, False),  # a row that keeps nothing is not stored
        ([1, 99], 100, 2, False),  # 2 * 99 * (2 + 2) = 792
        ([1, 100], 100, 2, True),
        ([1, 100], 100, 1, False),
        ([1, 40000], 70000, 4, True),  # indices of four bytes
    ],
)
def test_where_padding_takes_more_than_the_dense_weight(
    counts: list[int], width: int, value_bytes: int, refused: bool
) -> None:
    mask = np.arange(width) < np.array(counts, int).reshape(-1, 1)
    problem = padding_problem(mask, value_bytes)
    assert bool(problem) is refused
    if refused:
        assert problem.startswith(f"its rows keep {min(c for c in counts if c)} to {max(counts)} of {width} weights: ")
