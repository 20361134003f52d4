"""Rows that share their indices: the format, what checks it, and the operators that read it, against the oracle.

``test_oracle_isas.py`` runs the oracle's part, ``test_oracle_shared.py``, for each instruction set.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import DTYPES, condensed, operands, scales_of

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.errors import FormatError
from srigl_fx.runtime import reference
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.prepared_weights import panel_of
from srigl_fx.runtime.dense import FUNCTIONS
from srigl_fx.runtime.format import CondensedWeight, ValueDtype, count_index_rows, is_padding
from srigl_fx.runtime.validation import check_weight

linear = torch.ops.srigl_fx.condensed_linear
conv = torch.ops.srigl_fx.condensed_conv
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)


def expanded(weight: CondensedWeight) -> CondensedWeight:
    """The same weight with indices of its own for each row."""
    return dataclasses.replace(weight, indices=weight.row_indices.copy(), active=weight.rows.copy())


def test_hand_computed() -> None:
    mask = np.array([[1, 0, 1, 1, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [0, 1, 1, 1, 0]], bool)
    weight = np.arange(25.0).reshape(5, 5) * mask
    shared = CondensedWeight.from_dense(weight, mask)
    assert shared.values.tolist() == [[0, 2, 3], [5, 7, 8], [15, 17, 18], [21, 22, 23]]
    assert shared.indices.tolist() == [[0, 2, 3], [0, 2, 3], [0, 2, 3], [1, 2, 3]]  # twelve bytes would take sixteen
    mask = np.tile(mask[[0, 0, 2, 0, 4]], (1, 2))
    weight = np.arange(50.0).reshape(5, 10) * mask
    shared = CondensedWeight.from_dense(weight, mask)
    assert shared.indices.tolist() == [[0, 2, 3, 5, 7, 8], [1, 2, 3, 6, 7, 8]]
    assert shared.active.tolist() == [[0, 1, 3, 4], [0, 0, 0, 1]]
    assert shared.active.dtype == np.int32
    assert (shared.n_active, shared.k, shared.rows.tolist()) == (4, 6, [0, 1, 3, 4])
    assert shared.nbytes == 24 * 4 + 12 * 2 + 8 * 4 + 5 * 4
    back, kept = shared.to_dense()
    assert np.array_equal(back, weight)
    assert np.array_equal(kept, mask)


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(["random", "uneven"]),
)
def test_round_trip(
    rows: int, columns: int, groups: list[int], data: st.DataObject, dtype: ValueDtype, pattern: str
) -> None:
    k, n_active = data.draw(st.integers(1, columns)), data.draw(st.integers(0, rows))
    weight = condensed(rows, columns, k, n_active=n_active, groups=groups, dtype=dtype, pattern=pattern)
    weight.check()
    dense, mask = weight.to_dense()
    assert len(weight.indices) == count_index_rows(mask)
    assert weight.nbytes <= expanded(weight).nbytes
    own, own_mask = expanded(weight).to_dense()
    assert np.array_equal(dense, own)
    assert np.array_equal(mask, own_mask)
    if dtype == "float32":
        again = CondensedWeight.from_dense(dense, mask, weight.bias, pad=True)
        assert np.array_equal(again.values, weight.values)
        assert np.array_equal(again.active, weight.active)


def test_a_weight_without_partners_is_as_it_was() -> None:
    weight = condensed(40, 60, 7)
    assert weight.indices.shape == weight.values.shape == (40, 7)
    assert weight.active.shape == (40,)
    one_pair = condensed(40, 60, 7, groups=(2, *[1] * 38))  # saves 14 bytes, and would take 160
    assert one_pair.active.shape == (40,)


@pytest.mark.parametrize("group", [4, 8])
def test_files_and_panels_are_small(group: int) -> None:
    n, in_features, k = 768, 3072, 307
    weight = condensed(n, in_features, k, groups=(group,))
    dense = 4 * n * in_features
    assert len(weight.indices) == n // group
    assert weight.nbytes <= 0.115 * dense
    checked = check_weight("condensed_linear", *operands(weight), in_features)
    assert checked is not None
    window = plan.tile_window(in_features, n, k)
    panel = panel_of(checked, plan.SHARED_TILE, window, *operands(weight)[:3], in_features, n, n)
    assert panel.nbytes <= 0.13 * dense


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "starts late": ({"active": np.array([[0, 1, 2, 3], [1, 1, 1, 1]], np.int32)}, "are not 0, and then"),
    "jumps": ({"active": np.array([[0, 1, 2, 3], [0, 0, 2, 2]], np.int32)}, "are not 0, and then"),
    "goes back": ({"active": np.array([[0, 1, 2, 3], [0, 1, 0, 1]], np.int32)}, "are not 0, and then"),
    "too far": ({"active": np.array([[0, 1, 2, 3], [0, 1, 2, 2]], np.int32)}, "are not 0, and then"),
    "not to the end": ({"active": np.array([[0, 1, 2, 3], [0, 0, 0, 0]], np.int32)}, "are not 0, and then"),
    "negative": ({"active": np.array([[0, 1, 2, 3], [-1, 0, 0, 1]], np.int32)}, "are not 0, and then"),
    "rows descend": ({"active": np.array([[0, 2, 1, 3], [0, 0, 1, 1]], np.int32)}, "not ascending"),
    "a row too many": ({"active": np.array([[0, 1, 2, 4], [0, 0, 1, 1]], np.int32)}, "active row of 4"),
    "three rows": ({"active": np.zeros((3, 4), np.int32)}, "active has shape|n_active"),
    "one short": ({"active": np.array([[0, 1, 2], [0, 0, 1]], np.int32)}, "active has shape|n_active"),
    "not said": ({"active": np.arange(4, dtype=np.int32)}, "does not say which rows share|n_active"),
    "an index out of range": ({"indices": np.array([[0, 1, 2, 9], [0, 1, 2, 3]], np.int32)}, "index of 9"),
    "indices descend": ({"indices": np.array([[0, 1, 2, 3], [0, 2, 1, 3]], np.int32)}, "not ascending"),
    "more rows of indices": (
        {"indices": np.zeros((5, 4), np.int32), "active": np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.int32)},
        "indices have 5 rows|n_active",
    ),
    "a column less": ({"indices": np.array([[0, 1, 2], [0, 1, 2]], np.int32)}, "differ in shape|n_active"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    weight = CondensedWeight(
        values=np.ones((4, 4), np.float32),
        indices=np.array([[0, 1, 2, 3], [0, 2, 5, 8]], np.uint16),
        active=np.array([[0, 1, 2, 3], [0, 0, 1, 1]], np.int32),
        bias=np.zeros(4, np.float32),
        out_features=4,
        in_features=9,
    )
    weight.check()
    wrong = dataclasses.replace(weight, **changes)
    with pytest.raises(FormatError, match=message):
        wrong.check()
    with pytest.raises(FormatError, match=message):
        linear(torch.ones(2, 9), *operands(wrong), 9)


def test_padding_that_rows_share_is_zero_in_each() -> None:
    weight = condensed(8, 30, 6, groups=(4,), pattern="uneven", seed=3)
    assert weight.active.ndim == 2
    padding = is_padding(weight.row_indices)
    assert padding.any()
    weight.values[padding] = 1.0
    with pytest.raises(FormatError, match="only zeros at its end may repeat its last index"):
        weight.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oracle_reads_shared_indices(dtype: ValueDtype) -> None:
    """Against the same weight with indices for each row, and that against a dense product."""
    weight = condensed(19, 40, 6, n_active=17, groups=(4, 1, 3), dtype=dtype, pattern="uneven")
    own, x = expanded(weight), np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    assert weight.active.ndim == 2
    given: dict[str, Any] = {"scales": weight.scales}
    shared, alone = (
        reference.condensed_linear(x, one.values, one.indices, one.active, one.bias, **given) for one in (weight, own)
    )
    assert np.array_equal(shared, alone)
    if dtype != "int8":
        np.testing.assert_allclose(shared, x @ weight.to_dense()[0].T + weight.bias, rtol=1e-4, atol=1e-4)
    image = np.random.default_rng(0).standard_normal((2, 10, 5, 4)).astype(np.float32)
    given |= {"weight_shape": (19, 10, 2, 2)}
    shared, alone = (
        reference.condensed_conv(image, one.values, one.indices, one.active, one.bias, **given) for one in (weight, own)
    )
    assert np.array_equal(shared, alone)


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_of_a_linear_layer(activation: str, batch: int) -> None:
    weight = condensed(19, 37, 5, n_active=15, groups=(4, 1), pattern="uneven")
    assert weight.active.ndim == 2
    values, indices, active, bias = operands(weight)
    x, dense = torch.randn(batch, 37).requires_grad_(), torch.from_numpy(weight.to_dense()[0]).requires_grad_()
    y = linear(x, values.requires_grad_(), indices, active, bias.requires_grad_(), 37, None, activation)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, values, bias], grad)
    plain = FUNCTIONS[activation](torch.nn.functional.linear(x, dense, bias))
    expected = torch.autograd.grad(plain, [x, dense, bias], grad)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    rows = torch.from_numpy(weight.row_indices.astype(np.int64))
    entries = expected[1][active[0].long()].gather(1, rows) * torch.from_numpy(~is_padding(weight.row_indices))
    torch.testing.assert_close(got[1], entries, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=2e-5)


def test_gradients_of_a_convolution() -> None:
    weight = condensed(18, 36, 9, n_active=17, groups=(4,))
    values, indices, active, bias = operands(weight)
    x = torch.randn(2, 4, 7, 7).requires_grad_()
    dense = torch.from_numpy(weight.to_dense()[0]).reshape(18, 4, 3, 3).requires_grad_()
    y = conv(x, values.requires_grad_(), indices, active, bias, [18, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, values], grad)
    expected = torch.autograd.grad(torch.nn.functional.conv2d(x, dense, bias, padding=1), [x, dense], grad)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    rows = torch.from_numpy(weight.row_indices.astype(np.int64))
    entries = expected[1].reshape(18, 36)[active[0].long()].gather(1, rows)
    torch.testing.assert_close(got[1], entries, rtol=1e-4, atol=1e-4)


def test_a_change_of_who_shares_is_seen() -> None:
    weight = condensed(8, 20, 6, groups=(4,))
    parts, x = operands(weight), torch.randn(40, 20)
    linear(x, *parts, 20)
    parts[2][1] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    other = dataclasses.replace(weight, active=parts[2].numpy())
    expected = reference.condensed_linear(x.numpy(), other.values, other.indices, other.active, other.bias)
    torch.testing.assert_close(linear(x, *parts, 20), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    parts[2][1, 0] = 1
    with pytest.raises(FormatError, match="are not 0, and then"):
        linear(x, *parts, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fake_operator_knows_the_shape(dtype: ValueDtype) -> None:
    weight = condensed(19, 37, 5, groups=(4,), dtype=dtype)
    parts = [part.to("meta") for part in operands(weight)]
    scales = scales_of(weight)
    y = linear(torch.empty(3, 37, device="meta"), *parts, 37, scales=None if scales is None else scales.to("meta"))
    assert (y.device.type, tuple(y.shape)) == ("meta", (3, 19))
