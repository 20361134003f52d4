"""Outputs that are rounded with a given scale: what rounding the same layer's float outputs gives, byte for byte.

Run as they are for this CPU's best target, and by ``test_oracle_isas.py`` for each of them.
"""

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import ACTIVATIONS, SHAPES, Convolution, condensed
from kernel_support.whole_numbers import run_conv, run_linear, whole, whole_samples
from torch import Tensor

from srigl_fx.runtime import reference
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.quantisation import round_with

offsets = pytest.mark.parametrize("offset", [0, 128])
residuals = pytest.mark.parametrize("residual", [False, True])
SCALE = 0.03  # about the outputs of these layers, so that some are clipped and some are between two steps


def check_linear(weight: CondensedWeight, x: Tensor, offset: int, residual: bool, **settings: Any) -> None:
    added = torch.randn(*x.shape[:-1], weight.out_features) if residual else None
    y = run_linear(weight, x, residual=added, **settings)
    rounded = run_linear(weight, x, residual=added, y_scale=SCALE, y_offset=offset, **settings)
    assert rounded.dtype is torch.uint8
    assert rounded.stride() == y.stride()
    np.testing.assert_array_equal(rounded, round_with(y.numpy(), SCALE, offset))


def check_conv(
    shape: Convolution, weight: CondensedWeight, x: Tensor, offset: int, residual: bool, **more: Any
) -> None:
    added = torch.randn(x.shape[0], shape.n, *shape.output_size) if residual else None
    y = run_conv(shape, weight, x, residual=added, **more)
    rounded = run_conv(shape, weight, x, residual=added, y_scale=SCALE, y_offset=offset, **more)
    assert rounded.dtype is torch.uint8
    np.testing.assert_array_equal(rounded, round_with(y.numpy(), SCALE, offset))


@offsets
@residuals
@pytest.mark.parametrize("n", [1, 7, 16, 33, 300])
def test_linear(n: int, residual: bool, offset: int, int8_kernel: int) -> None:
    weight = condensed(n, 70, 9, n_active=max(1, n - n // 9), dtype="int8")
    for batch in (1, 2, 15, 17, 33, 48, 63, 64, 130):
        check_linear(weight, torch.randn(batch, 70), offset, residual, activation="relu")
    check_linear(weight, torch.randn(2, 0, 70), offset, residual)
    check_linear(weight, torch.randn(2, 3, 70), offset, residual, activation="gelu")


@residuals
@pytest.mark.parametrize("groups", [(4,), (16,), (4, 1, 3)], ids=str)
def test_rows_that_share_their_inputs(groups: tuple[int, ...], residual: bool, int8_kernel: int) -> None:
    weight = condensed(53, 70, 9, n_active=47, groups=groups, dtype="int8")
    for batch in (1, 7, 20, 48, 64, 100):
        for columns in (False, True):
            x = torch.randn(batch, 70)
            check_linear(weight, x, 128, residual, y_feature_major=columns, activation="relu")


@residuals
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, residual: bool) -> None:
    weight, shape = condensed(37, 70, 9, n_active=33, dtype="int8"), SHAPES["2d pointwise, 16 positions"]
    for batch in (3, 40, 70):
        check_linear(weight, torch.randn(batch, 70), 128, residual, activation=activation)
    check_conv(shape, shape.condensed(3, dtype="int8"), shape.input(2), 128, residual, activation=activation)


@offsets
@residuals
def test_feature_major(residual: bool, offset: int) -> None:
    weight = condensed(37, 70, 9, n_active=33, dtype="int8")
    for batch in (1, 5, 20, 40, 63, 64, 130):
        x = torch.randn(batch, 70)
        for one in (x, x.t().contiguous().t()):
            check_linear(weight, one, offset, residual, y_feature_major=True, activation="silu")


@residuals
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions(name: str, residual: bool) -> None:
    shape = SHAPES[name]
    for n_active in {shape.n, shape.n - 1}:
        weight = shape.condensed(3 if shape.in_features > 2 else 1, n_active=n_active, dtype="int8")
        for batch, activation in ((1, "relu"), (3, "gelu_tanh")):
            check_conv(shape, weight, shape.input(batch), 128, residual, activation=activation)


@offsets
@residuals
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (3, 5), (1, 64), (13, 13)])
def test_outputs_that_are_finished_in_their_place(size: tuple[int, int], residual: bool, offset: int) -> None:
    """Of pointwise convolutions: whole tiles of 64 positions, and parts of one."""
    shape = Convolution(n=32, channels=20, kernel=(1, 1), size=size)
    for activation in ("none", "relu", "relu6"):
        check_conv(shape, shape.condensed(7, dtype="int8"), shape.input(3), offset, residual, activation=activation)


@offsets
def test_bytes_in_and_bytes_out(offset: int, int8_kernel: int) -> None:
    weight, shape = condensed(37, 70, 9, n_active=33, dtype="int8"), SHAPES["2d strided"]
    given = {"x_scale": 0.02, "x_offset": 128}
    for batch in (5, 33, 70):
        x = torch.ops.srigl_fx.round_samples(torch.randn(batch, 70), 0.02, 128)
        check_linear(weight, x, offset, True, **given)
    images = torch.ops.srigl_fx.round_samples(shape.input(2), 0.02, 128)
    check_conv(shape, shape.condensed(5, dtype="int8"), images, offset, True, **given)


@offsets
def test_layers_without_weights(offset: int) -> None:
    """What they give is their bias, whatever they are handed."""
    weight, shape = condensed(5, 9, 4, n_active=0, dtype="int8"), SHAPES["2d"]
    filters = shape.condensed(3, n_active=0, dtype="int8")
    for dtype in (torch.float32, torch.uint8):
        given: dict[str, Any] = {"x_scale": 0.5} if dtype is torch.uint8 else {}
        for batch in (1, 40):
            for columns in (False, True):
                x = torch.ones(batch, 9, dtype=dtype)
                check_linear(weight, x, offset, True, y_feature_major=columns, **given)
        check_conv(shape, filters, shape.input(2).to(dtype), offset, True, **given)


@offsets
def test_outputs_that_are_no_numbers_or_out_of_reach(offset: int, int8_kernel: int) -> None:
    weight = condensed(37, 70, 9, n_active=33, dtype="int8")
    x = torch.randn(70, 70)
    x[3, 4], x[5, 6] = math.nan, math.inf
    residual = torch.zeros(70, 37)
    residual[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    y = run_linear(weight, x, residual=residual)
    assert y.isnan().sum() > 60
    rounded = run_linear(weight, x, residual=residual, y_scale=SCALE, y_offset=offset)
    np.testing.assert_array_equal(rounded, round_with(y.numpy(), SCALE, offset))
    assert rounded[0, :3].tolist() == [offset, 255, 0]


@offsets
def test_the_reference(offset: int, int8_kernel: int) -> None:
    """Of whole numbers nothing is rounded before the outputs are."""
    weight = whole(condensed(37, 70, 9, n_active=33))
    steps, _ = whole_samples(66, 70)
    x = torch.from_numpy(steps.astype(np.float32))
    given: dict[str, Any] = {"x_scale": 1.0, "x_offset": 128, "y_scale": 256.0, "y_offset": offset}
    expected = reference.condensed_linear(
        x.numpy(), weight.values, weight.indices, weight.active, weight.bias, scales=weight.scales, **given
    )
    assert expected.dtype == np.uint8
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(run_linear(weight, x, **given), expected)


def test_the_reference_of_convolutions() -> None:
    shape = SHAPES["2d groups"]
    weight = whole(shape.condensed(5))
    x = torch.from_numpy(whole_samples(3, shape.channels, *shape.size)[0].astype(np.float32))
    given: dict[str, Any] = {"x_scale": 1.0, "x_offset": 128, "y_scale": 256.0, "y_offset": 128}
    expected = reference.condensed_conv(
        *(x.numpy(), weight.values, weight.indices, weight.active, weight.bias),
        weight_shape=shape.weight_shape,
        pads=shape.padding * 2,
        group=shape.groups,
        scales=weight.scales,
        **given,
    )
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(run_conv(shape, weight, x, **given), expected)


@offsets
def test_tasks_that_share_outputs(offset: int) -> None:
    """Neighbouring bytes are of different tasks, which write at the same time."""
    weight, shape = condensed(301, 500, 60, n_active=277, dtype="int8"), Convolution(n=201, channels=40, size=(12, 13))
    filters = shape.condensed(9, dtype="int8")
    for threads in (2, 3):
        with torch_threads(threads):
            for batch in (1, 5, 33, 70):
                check_linear(weight, torch.randn(batch, 500), offset, False)
            check_conv(shape, filters, torch.randn(3, 40, 12, 13), offset, False, activation="relu")


@pytest.mark.parametrize("count", [*range(34), 63, 64, 65, 127])
def test_nothing_behind_the_last_byte_is_written(count: int) -> None:
    x, y = torch.randn(count), torch.full((count + 40,), 7, dtype=torch.uint8)
    for shift in (0, 1, 5):
        y.fill_(7)
        j = (ctypes.c_int64 * job.SIZE)()
        j[job.X], j[job.Y], j[job.BATCH], j[job.ROW_SPLITS] = x.data_ptr(), y.data_ptr() + shift, count, 1
        j[job.X_SCALE], j[job.X_OFFSET] = int(np.float32(0.02).view(np.int32)), 128
        entry("int8_round_task")[0](ctypes.addressof(j), 0)
        np.testing.assert_array_equal(y[shift : shift + count], round_with(x.numpy(), 0.02, 128))
        assert (y[:shift] == 7).all()
        assert (y[shift + count :] == 7).all()
