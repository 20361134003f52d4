"""What becomes of a finished sum: limits and activations.

Owns the arithmetic of activations on the GPU. Which there are, and what limits them, is said by
:mod:`srigl_fx.runtime.activations`.
"""

import math
from typing import Any, Final

import numpy as np

from srigl_fx.runtime.activations import ACTIVATIONS, NUMBERS
from srigl_fx.runtime.cuda.kernels.compiler import device
from srigl_fx.runtime.cuda.kernels.machine import erf, exp, tanh

_HALF, _ONE, _THREE, _SIX, _ZERO = (np.float32(number) for number in (0.5, 1, 3, 6, 0))
_SQRT_HALF = np.float32(math.sqrt(0.5))
_SLOPE, _CUBIC = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)


@device
def _gelu(y: Any) -> Any:
    return y * (_ONE + erf(y * _SQRT_HALF)) * _HALF


@device
def _gelu_tanh(y: Any) -> Any:
    return y * (_ONE + tanh(_SLOPE * (y + _CUBIC * y * y * y))) * _HALF


@device
def _sigmoid(y: Any) -> Any:
    return _ONE / (_ONE + exp(-y))


@device
def _silu(y: Any) -> Any:
    return y / (_ONE + exp(-y))


@device
def _hardswish(y: Any) -> Any:
    return y * limited(y + _THREE, _ZERO, _SIX) / _SIX


@device
def _tanh(y: Any) -> Any:
    return tanh(y)


@device
def limited(y: Any, low: Any, high: Any) -> Any:
    """Between both, or NaN."""
    y = low if y < low else y
    return high if y > high else y


FUNCTIONS: Final[dict[str, Any]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "hardswish": _hardswish,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
}


@device
def _unchanged(y: Any, activation: int) -> Any:
    return y


def _choice(name: str, otherwise: Any) -> Any:
    number, function = NUMBERS[name], FUNCTIONS[name]

    @device
    def choose(y: Any, activation: int) -> Any:
        return function(y) if activation == number else otherwise(y, activation)

    return choose


_chosen = _unchanged
for _row in ACTIVATIONS:
    if _row.limits is None:
        _chosen = _choice(_row.name, _chosen)


@device
def finish(y: Any, activation: int, low: Any, high: Any) -> Any:
    """The output for a sum with bias and residual: the activation of this number, within limits."""
    return limited(_chosen(y, activation), low, high)
