"""Values of eight bits, operator by operator, in the library, in a stock ONNX Runtime and in ONNX's own evaluator.

Samples are chosen for how they are rounded: with and without signs, between two steps, too small to count, not finite.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import ACTIVATIONS, SHAPES, bits, condensed
from kernel_support.onnx_models import ConvOperator, LinearOperator

from srigl_fx.runtime.quantisation import SMALLEST, quantise_samples

HOSTS = {"library": (True, False), "stock": (False, False), "reference": (False, True)}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    library, reference = HOSTS[request.param]
    if library:
        request.getfixturevalue("library")  # built, or the test is skipped
    with np.errstate(invalid="ignore"):  # the evaluator computes with infinity as it is told to
        yield {"library": library, "reference": reference}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_every_linear_operator(residual: bool, activation: str, host: dict[str, Any]) -> None:
    weight = condensed(37, 60, 10, n_active=31, dtype="int8")
    for rank, leading in ((1, [()]), (2, [(0,), (1,), (5,), (40,)]), (3, [(2, 3), (0, 3), (3, 0), (3, 1)])):
        operator = LinearOperator(weight, rank=rank, residual=residual, activation=activation, **host)
        for sizes in leading:
            operator.check(torch.randn(*sizes, 60))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["1d", "2d groups", "3d", "1d transposed", "2d transposed, strided"])
def test_every_convolution(name: str, residual: bool, activation: str, host: dict[str, Any]) -> None:
    shape = SHAPES[name]
    weight = shape.condensed(3, n_active=shape.n - 1, dtype="int8")
    operator = ConvOperator(shape, weight, residual=residual, activation=activation, **host)
    for batch in (1, 3) if host["reference"] else (0, 1, 3):  # the evaluator has no convolution of no sample
        operator.check(shape.input(batch))


@pytest.mark.parametrize(("x_feature_major", "y_feature_major"), [(True, False), (False, True), (True, True)])
def test_every_layout(x_feature_major: bool, y_feature_major: bool, host: dict[str, Any]) -> None:
    weight = condensed(40, 60, 9, n_active=33, dtype="int8")
    operator = LinearOperator(
        weight, rank=3, residual=True, x_feature_major=x_feature_major, y_feature_major=y_feature_major, **host
    )
    for sizes in ((2, 3), (0, 4), (5, 13)):
        operator.check(torch.randn(*sizes, 60))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("x_feature_major", [False, True])
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_tasks_that_share_samples(y_feature_major: bool, x_feature_major: bool) -> None:
    """There is work for several tasks, which read samples that were rounded once, on one thread or on all."""
    weight = condensed(300, 500, 60, n_active=277, dtype="int8")
    operator = LinearOperator(
        weight, library=True, residual=True, x_feature_major=x_feature_major, y_feature_major=y_feature_major
    )
    for batch in (9, 16, 17, 64, 70, 129, 150):
        operator.check(torch.randn(batch, 500))


@pytest.mark.parametrize("batch", [1, 5, 17, 64])
def test_samples_with_and_without_signs(batch: int, host: dict[str, Any]) -> None:
    operator = LinearOperator(condensed(37, 60, 10, n_active=31, dtype="int8"), **host)
    x = torch.randn(batch, 60)
    x[::2].abs_()
    x[::4, :5] = -0.0  # has a sign, and is not negative
    assert set(quantise_samples(x.numpy())[2].tolist()) <= {0, 128}
    operator.check(x)
    operator.check(-x)


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_between_two_steps_are_rounded_to_even_ones(sign: int, host: dict[str, Any]) -> None:
    """Each output is one input, so that its last bit shows how that was rounded."""
    weight = condensed(60, 60, 1, dtype="int8", pattern="run")
    operator = LinearOperator(weight, **host)
    for largest in (255.0,) if sign > 0 else (127.0,):
        x = torch.arange(60, dtype=torch.float32).add(0.5).mul(sign).repeat(18, 1)
        x[:, 59] = sign * largest
        rounded, scales, offsets = quantise_samples(x.numpy())
        assert scales[0] == 1
        assert (rounded[0].astype(np.int64) - offsets[0])[:4].tolist() == [0, 2 * sign, 2 * sign, 4 * sign]
        for batch in (1, 18):
            operator.check(x[:batch])


def test_samples_that_are_too_small_to_count(host: dict[str, Any]) -> None:
    weight = condensed(37, 60, 10, n_active=31, dtype="int8")
    operator = LinearOperator(weight, **host)
    x = torch.zeros(6, 60)
    x[1], x[2, 3], x[3], x[4], x[5] = 1e-40, SMALLEST, -SMALLEST, 0.99 * SMALLEST, -1e-45
    y = operator.check(x)
    assert bits(y[[0, 1, 4, 5]]) == np.tile(weight.bias, (4, 1)).tobytes()


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_unknown_where_a_row_has_weights(special: float, host: dict[str, Any]) -> None:
    weight = condensed(37, 60, 10, n_active=31, dtype="int8")
    ablated = np.setdiff1d(np.arange(37), weight.active)
    operator = LinearOperator(weight, **host)
    shape = SHAPES["2d groups"]
    filters = shape.condensed(3, n_active=shape.n - 1, dtype="int8")
    convolution = ConvOperator(shape, filters, **host)
    for sample in range(3):
        x, image = torch.randn(3, 60), shape.input(3)
        x[sample, 7] = image[sample, 1, 2, 3] = special
        y, others = operator.check(x), torch.arange(3) != sample
        assert y[sample, weight.active].isnan().all()
        assert bits(y[sample, ablated]) == weight.bias[ablated].tobytes()
        assert y[others].isfinite().all()
        z = convolution.check(image)
        assert z[sample, filters.active].isnan().all()
        assert z[others].isfinite().all()
