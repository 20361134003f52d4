"""Layers whose rows share indices against the oracle: every dtype, sizes of groups, special numbers, ONNX Runtime.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    Convolution,
    axes,
    check_conv,
    check_linear,
    condensed,
    layouts,
    operands,
)
from kernel_support.onnx_models import ConvOperator, LinearOperator

from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import ValueDtype
from srigl_fx.runtime.value_types import FLOATS

dtypes = pytest.mark.parametrize("dtype", DTYPES)
float_dtypes = pytest.mark.parametrize("dtype", FLOATS)
BATCHES = (0, 1, 2, 5, 6, 16, 17, 31, 32, 33, 48, 64, 67)
# Groups of one size, with a rest of rows, and mixed ones: rows alone between others, and many of them.
GROUPS: dict[str, tuple[int, ...]] = {
    **{str(size): (size,) for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 100)},
    "4 and 1": (4, 1),
    "many alone": (4, 4, 4, 4, *[1] * 20, 3),
    "1 to 7": (1, 2, 3, 4, 5, 6, 7),
}
groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)


@pytest.fixture(params=[True, False], ids=["library", "fallback"])
def by_library(request: pytest.FixtureRequest) -> bool:
    if request.param:
        request.getfixturevalue("library")  # built, or the test is skipped
    return bool(request.param)


@dtypes
@groups
def test_groups(sizes: tuple[int, ...], dtype: ValueDtype) -> None:
    weight = condensed(75, 70, 9, n_active=71, groups=sizes, dtype=dtype)
    for batch in BATCHES:
        check_linear(weight, torch.randn(batch, 70))


@pytest.mark.parametrize("k", [*range(1, 10), 63, 64, 65])
def test_fan_ins(k: int) -> None:
    weight = condensed(21, 400, k, n_active=20, groups=(4,))
    for batch in (1, 16, 33):
        check_linear(weight, torch.randn(batch, 400))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_batch_size(dtype: ValueDtype) -> None:
    weight = condensed(37, 75, 7, n_active=33, groups=(4,), dtype=dtype)
    for batch in axes(67, 96, 128):
        check_linear(weight, torch.randn(batch, 75))


@dtypes
@pytest.mark.parametrize(("n", "n_active"), [(1, 1), (4, 4), (5, 5), (15, 13), (16, 16), (33, 31), (257, 250), (9, 0)])
def test_rows(n: int, n_active: int, dtype: ValueDtype) -> None:
    weight = condensed(n, 90, 11, n_active=n_active, groups=(4,), dtype=dtype)
    for batch in (1, 16, 40, 64):
        check_linear(weight, torch.randn(batch, 90))


@pytest.mark.parametrize(
    ("in_features", "k"), [(4094, 60), (4095, 60), (4096, 500), (65535, 50), (65536, 50), (65537, 50)]
)
def test_wide_inputs(in_features: int, k: int) -> None:
    weight = condensed(19, in_features, k, n_active=18, groups=(4,))
    for batch in (1, 3, 17, 33):
        check_linear(weight, torch.randn(batch, in_features))


@dtypes
def test_shorter_rows(dtype: ValueDtype) -> None:
    weight = condensed(40, 70, 9, n_active=37, groups=(4,), pattern="uneven", dtype=dtype)
    assert weight.active.ndim == 2
    for batch in BATCHES:
        check_linear(weight, torch.randn(batch, 70))


@pytest.mark.parametrize("batch", [1, 7, 32, 50])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues_and_layouts(activation: str, batch: int) -> None:
    weight = condensed(37, 70, 9, n_active=33, groups=(4,))
    for residual in (None, torch.randn(batch, 37)):
        for y_feature_major in (False, True):
            for x in list(layouts(torch.randn(batch, 70)).values())[:4]:
                check_linear(weight, x, residual=residual, activation=activation, y_feature_major=y_feature_major)


@float_dtypes
def test_weights_that_are_not_packed(dtype: ValueDtype) -> None:
    weight = condensed(40, 70, 9, n_active=37, groups=(4,), pattern="uneven", dtype=dtype)
    with torch.inference_mode():  # torch does not count the writes to what is made here
        tensors = tuple(part.clone() for part in operands(weight))
    for batch in (1, 7, 40):
        check_linear(weight, torch.randn(batch, 70), tensors=tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    weight = condensed(530, 300, 90, n_active=513, groups=(4,))
    with torch_threads(threads):
        for batch in (1, 20, 64, 200):
            check_linear(weight, torch.randn(batch, 300))


@float_dtypes
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [1, 16, 24, 70])
def test_every_input(batch: int, special: float, dtype: ValueDtype) -> None:
    weight = condensed(37, 150, 3, n_active=35, groups=(4, 1, 3), dtype=dtype)
    mask = torch.from_numpy(weight.to_dense()[1])
    for column in range(0, 150, 7):
        x = torch.randn(batch, 150)
        x[column % batch, column] = special
        y = check_linear(weight, x)
        assert torch.equal(~y[column % batch].isfinite(), mask[:, column])
        assert y.isfinite().sum() == y.numel() - mask[:, column].sum()


@float_dtypes
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_numbers_that_are_not_finite_or_tiny(batch: int, dtype: ValueDtype) -> None:
    for special in (math.nan, math.inf, -math.inf, 1e-42, 6e4):
        weight = condensed(20, 50, 6, n_active=18, groups=(4,), dtype=dtype)
        x = torch.randn(batch, 50)
        x[:, np.setdiff1d(np.arange(50), weight.indices)] = math.nan  # what no weight meets is not read
        check_linear(weight, x)
        weight.values[3, 2] = special
        weight.bias[1] = special
        check_linear(weight, x)
        check_linear(weight, x * 1e-38)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolutions(shape: Convolution) -> None:
    for k, n_active in ((min(9, shape.in_features), shape.n - 1), (shape.in_features, shape.n)):
        weight = shape.condensed(k, n_active=n_active, groups=(4,))
        for batch in (1, 3):
            check_conv(shape, weight, shape.input(batch))


@dtypes
@pytest.mark.parametrize("sizes", [(3,), (4,), (8,), (4, 1, 16)], ids=str)
@pytest.mark.parametrize(("n_groups", "transposed"), [(1, False), (2, False), (2, True)])
def test_many_filters(n_groups: int, transposed: bool, sizes: tuple[int, ...], dtype: ValueDtype) -> None:
    """Rows that share may reach from one group of the convolution into the next, whose channels are others."""
    shape = Convolution(n=44, channels=40, groups=n_groups, padding=(1, 1), size=(6, 7), transposed=transposed)
    weight = shape.condensed(9, n_active=41, groups=sizes, dtype=dtype)
    for batch, activation in ((1, "relu"), (3, "silu")):
        residual = torch.randn(batch, shape.n, *shape.output_size)
        check_conv(shape, weight, shape.input(batch), residual=residual, activation=activation)
        check_conv(shape, weight, shape.input(batch))


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_special_numbers_of_a_convolution(special: float) -> None:
    shape = Convolution(n=20, channels=6, padding=(1, 1), size=(5, 6))
    weight = shape.condensed(5, n_active=18, groups=(4,))
    x = shape.input(3)
    x[1, 2, 3, 3] = special
    check_conv(shape, weight, x)


@dtypes
@groups
def test_onnx(sizes: tuple[int, ...], by_library: bool, dtype: ValueDtype) -> None:
    weight = condensed(
        40, 70, 9, n_active=37, groups=sizes, dtype=dtype, pattern="uneven" if sizes == (3,) else "random"
    )
    operator = LinearOperator(weight, library=by_library)
    for batch in BATCHES:
        operator.check(torch.randn(batch, 70))


@pytest.mark.parametrize(("residual", "activation"), list(itertools.product((False, True), ("none", "relu", "gelu"))))
@pytest.mark.parametrize(("x_feature_major", "y_feature_major"), [(False, False), (True, False), (True, True)])
def test_onnx_epilogues(
    x_feature_major: bool, y_feature_major: bool, residual: bool, activation: str, by_library: bool
) -> None:
    weight = condensed(37, 60, 10, n_active=31, groups=(4,))
    given: dict[str, Any] = {"x_feature_major": x_feature_major, "y_feature_major": y_feature_major}
    operator = LinearOperator(weight, library=by_library, residual=residual, activation=activation, **given)
    for batch in (1, 17, 64):
        operator.check(torch.randn(batch, 60))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_onnx_weights_that_are_inputs(dtype: ValueDtype, by_library: bool) -> None:
    weight = condensed(37, 60, 10, n_active=31, groups=(4, 1), dtype=dtype)
    operator = LinearOperator(weight, library=by_library, constant=False)
    for batch in (1, 17, 64):
        operator.check(torch.randn(batch, 60))


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [20, 6])
def test_onnx_convolutions(n: int, transposed: bool, by_library: bool, dtype: ValueDtype) -> None:
    shape = Convolution(n=2 * n, channels=8, groups=2, padding=(1, 1), size=(6, 7), transposed=transposed)
    weight = shape.condensed(9, n_active=2 * n - 1, groups=(4,), dtype=dtype)
    operator = ConvOperator(shape, weight, library=by_library, activation="relu", residual=True)
    for batch in (1, 3):
        operator.check(shape.input(batch))


def test_onnx_by_its_own_evaluator() -> None:
    weight = condensed(37, 60, 10, n_active=31, groups=(4, 1), pattern="uneven")
    assert weight.active.ndim == 2
    LinearOperator(weight, library=False, reference=True).check(torch.randn(5, 60))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_onnxruntime_give_the_same_bits(dtype: ValueDtype) -> None:
    weight = condensed(70, 200, 17, n_active=66, groups=(4,), dtype=dtype)
    operator = LinearOperator(weight, library=True)
    for batch in (1, 2, 6, 17, 66):
        x = torch.randn(batch, 200)
        assert torch.equal(check_linear(weight, x), operator.check(x)), batch
