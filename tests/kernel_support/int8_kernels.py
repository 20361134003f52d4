"""A fixture for tests of the kernels of eight bits."""

import pytest

from srigl_fx.runtime.cpu import execute
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import AVX512_VBMI, host_target

_LOOKUP = host_target() == AVX512_VBMI
_WINDOWS = sorted({plan.int8_window(_LOOKUP, plan.INT8_DOT, 10_000, k) for k in (1, 5000)})
# A kernel and the window of its panel; that of a tile is all inputs.
_INT8_KERNELS = {**{f"int8 dot of {window}": (plan.INT8_DOT, window) for window in _WINDOWS}}
_INT8_KERNELS["int8 tile"] = (plan.INT8_TILE, 0)


@pytest.fixture(params=_INT8_KERNELS)
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every linear layer of eight bits in this test runs in that kernel, whatever the plan has for it."""
    forced, window = _INT8_KERNELS[request.param]
    monkeypatch.setattr(execute, "_int8_plan", lambda in_features, *_: (forced, window or in_features))
    return forced
