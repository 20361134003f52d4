"""``condensed_conv`` and its gradient against PyTorch's own convolutions, for any geometry that both take."""

import math
from typing import Any

import pytest
import torch
from geometry_support import Layer, layers, shifting
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_support import condensed, operands
from torch import Tensor

from srigl_fx.runtime.dense import expand

BUDGET = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def _operands(layer: Layer, kept: float, ablated: int) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    n = layer.groups * layer.filters
    shape = [n, layer.channels, *(axis.kernel for axis in layer.axes)]
    in_features = math.prod(shape[1:])
    weight = condensed(n, in_features, max(1, round(kept * in_features)), n_active=max(1, n - ablated))
    numbers = [[getattr(axis, name) for axis in layer.axes] for name in ("stride", "padding", "dilation")]
    more = {"transposed": True, "output_padding": [axis.output_padding for axis in layer.axes]}
    return list(operands(weight)), [shape, *numbers, layer.groups], more if layer.transposed else {}


def _dense(layer: Layer, x: Tensor, weight: list[Tensor], numbers: list[Any]) -> Tensor:
    """The same by PyTorch, in float64, from a weight that is laid out here, group by group."""
    shape, stride, padding, dilation, groups = numbers
    values, indices, active, bias = weight
    matrix, _ = expand(values.double(), indices, active, shape[0], math.prod(shape[1:]))
    dense = matrix.reshape(shape)
    name = f"conv{'_transpose' if layer.transposed else ''}{len(layer.axes)}d"
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if layer.transposed:
        dense = torch.cat([part.transpose(0, 1) for part in dense.chunk(groups)])
        settings["output_padding"] = [axis.output_padding for axis in layer.axes]
    y: Tensor = getattr(torch.nn.functional, name)(x, dense, bias.double(), **settings)
    return y


@pytest.mark.long
@BUDGET
@example(shifting(9), 1.0, 0, 2)
@example(shifting(16, filters=16), 1.0, 0, 1)
@example(shifting(4, rank=2, filters=17), 0.5, 1, 3)
@example(shifting(5, rank=3, padding=2), 1.0, 0, 1)
@given(
    layers(modes=("zeros",)).filter(lambda layer: not layer.named),
    st.floats(0, 1),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_any_geometry(layer: Layer, kept: float, ablated: int, batch: int) -> None:
    torch.manual_seed(0)
    weight, numbers, more = _operands(layer, kept, ablated)
    x = layer.input(batch)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y = torch.ops.srigl_fx.condensed_conv(mine, *weight, *numbers, **more)
    expected = _dense(layer, theirs, weight, numbers)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    given = torch.randn(y.shape)
    torch.autograd.backward(y, given)
    torch.autograd.backward(expected, given.double())
    assert mine.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
