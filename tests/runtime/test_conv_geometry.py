"""Convolutions of awkward shapes: the kernel by itself with every access checked, the torch operator, ONNX Runtime."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ort_support.models import WEIGHTS, Array, Node, conv

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.runtime import register
from srigl_fx.runtime.cpu.kernels import conv as kernel
from srigl_fx.runtime.cpu.kernels.plan import LANES

_SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def _convolutions(
    draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3), *, symmetric: bool = False
) -> tuple[Node, Array]:
    """A node and an input with a few NaNs and infinities: strides beyond the kernel, kernels beyond the image."""
    rank = draw(st.sampled_from(ranks))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    group = draw(st.integers(1, 3))
    n, group_channels = group * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, strides, dilations = each(1, 5 if rank < 3 else 3), each(1, 7), each(1, 4)
    before = each(0, 6)
    after = before if symmetric else each(0, 6)
    sizes = []
    for i, size in enumerate(each(1, 19 if rank == 2 else 40 if rank == 1 else 6)):
        missing = dilations[i] * (kernel[i] - 1) + 1 - before[i] - after[i]
        sizes.append(max(size, missing))
    in_features = group_channels * math.prod(kernel)
    node = conv(
        n=n,
        channels=group * group_channels,
        kernel=kernel,
        group=group,
        k=draw(st.integers(0, in_features) | st.just(in_features)),
        n_active=draw(st.integers(0, n) | st.just(n)),
        index_type=draw(st.sampled_from(["uint16", "int32"])),
        strides=strides,
        pads=[*before, *after],
        dilations=dilations,
    )
    x = np.random.default_rng(n).standard_normal((draw(st.integers(0, 3)), group * group_channels, *sizes))
    for special in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), max_size=2)):
        if x.size:
            x.reshape(-1)[draw(st.integers(0, x.size - 1))] = special
    return node, x.astype(np.float32)


def _compare(y: Array, node: Node, x: Array) -> None:
    with np.errstate(invalid="ignore"):
        expected = node.expected(x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


class _Guarded:
    """Memory of a known size; an access outside it is an error, and so is an element that nobody wrote."""

    def __init__(self, content: Array | int) -> None:
        self.content: list[Any] = [None] * content if isinstance(content, int) else content.reshape(-1).tolist()

    def __getitem__(self, at: int) -> Any:
        assert 0 <= at < len(self.content)
        return self.content[at]

    def __setitem__(self, at: int, value: Any) -> None:
        assert 0 <= at < len(self.content)
        self.content[at] = value


def _geometry(node: Node, x: Array) -> Any:
    spatial = x.ndim - 2
    attributes = node.attributes
    n, _, *taps = attributes["weight_shape"]

    def three(values: Any, fill: int) -> list[int]:
        return [fill] * (3 - spatial) + [int(value) for value in values]

    strides, dilations, pads = (attributes[name] for name in ("strides", "dilations", "pads"))
    out = [
        (x.shape[2 + i] + pads[i] + pads[spatial + i] - dilations[i] * (taps[i] - 1) - 1) // strides[i] + 1
        for i in range(spatial)
    ]
    numbers = [x.shape[1], n, attributes["group"], *three(x.shape[2:], 1), *three(out, 1), *three(taps, 1)]
    numbers += [
        *three(strides, 1),
        *three(pads[:spatial], 0),
        *three(dilations, 1),
        1,
        1,
        1,
        0,
        node.weights["values"].shape[1],
    ]
    return numbers + [0] * (kernel.GEOMETRY_SIZE - len(numbers))


def _interpret(node: Node, x: Array, blocks: int) -> Array:
    """Run the kernel's Python, with channels and filters in ``blocks`` blocks, last one first."""
    geometry = _geometry(node, x)
    shape = (x.shape[0], node.weights["bias"].shape[0], *geometry[kernel.OUT_D : kernel.OUT_W + 1][5 - x.ndim :])
    plane = math.prod(shape[2:])
    kernel.conv_plan(geometry)
    channels, n_active = x.shape[1], node.weights["active"].shape[0]
    size = channels * math.prod(geometry[kernel.PLANES_D : kernel.PACKED_W + 1])
    taps = math.prod(geometry[kernel.KERNEL_D : kernel.KERNEL_W + 1])
    outputs = math.prod(geometry[kernel.OUT_D : kernel.OUT_W + 1])
    assert size <= channels * taps * outputs
    offsets = _Guarded(node.attributes["in_features"])
    kernel.conv_tap_offsets(offsets, geometry)
    values, indices, active, bias = (_Guarded(node.weights[name]) for name in WEIGHTS)
    ablated = np.tile(np.repeat(node.weights["bias"], plane), x.shape[0])  # what is left where a filter is
    given_x, y = _Guarded(x), _Guarded(ablated)
    accumulators, index_rows = _Guarded(np.zeros(kernel.ACCUMULATORS)), _Guarded(np.arange(n_active))
    for sample in range(x.shape[0]):
        packed = given_x
        if not geometry[kernel.DIRECT]:
            packed = _Guarded((size // LANES + 2) * LANES)
            for block in reversed(range(blocks)):
                first, last = channels * block // blocks, channels * (block + 1) // blocks
                kernel.conv_pack(given_x, packed, geometry, sample, first, last, 0.0)
            assert None not in packed.content
        for block in reversed(range(blocks)):
            first, last = n_active * block // blocks, n_active * (block + 1) // blocks
            kernel.conv_rows(
                *(packed, values, indices, active, bias, y, geometry, offsets, accumulators, sample, first, last),
                *(index_rows, True),
            )
    return np.array(y.content, np.float64).reshape(shape).astype(np.float32)


@pytest.mark.slow
@given(case=_convolutions(), blocks=st.integers(1, 3))
@settings(max_examples=60, **_SETTINGS)
def test_every_access_is_inside(monkeypatch: pytest.MonkeyPatch, case: tuple[Node, Array], blocks: int) -> None:
    node, x = case
    monkeypatch.setattr(kernel, "BLOCK", 2 * LANES)  # so that small planes have several
    monkeypatch.setattr(kernel, "ACCUMULATORS", 3 * LANES)
    _compare(_interpret(node, x, blocks), node, x)


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (3, 5), (1, 1), (40, 40)])
def test_pointwise_convolutions(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    node = conv(n=6, channels=5, kernel=(1, 1), k=2, n_active=5)
    x = np.random.default_rng(0).standard_normal((2, 5, *size)).astype(np.float32)
    geometry = _geometry(node, x)
    kernel.conv_plan(geometry)
    assert geometry[kernel.DIRECT] == (math.prod(size) % LANES == 0)
    _compare(_interpret(node, x, 2), node, x)


@pytest.mark.slow
@given(case=_convolutions((2,), symmetric=True))
@settings(max_examples=150, **_SETTINGS)
def test_torch_operator(case: tuple[Node, Array]) -> None:
    node, x = case
    weights = [torch.from_numpy(node.weights[name]) for name in WEIGHTS]
    attributes = [node.attributes[name] for name in ("weight_shape", "strides", "pads", "dilations", "group")]
    attributes[2] = attributes[2][:2]
    y = torch.ops.srigl_fx.condensed_conv(torch.from_numpy(x), *weights, *attributes)
    _compare(y.numpy(), node, x)


@pytest.mark.long
@given(case=_convolutions(), threads=st.sampled_from([1, 3]))
@settings(max_examples=100, **_SETTINGS)
def test_onnxruntime_operator(library: Path, case: tuple[Node, Array], threads: int) -> None:
    node, x = case
    _compare(_run(node, x, threads), node, x)


def _run(node: Node, x: Array, threads: int = 1) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    register(options)
    session = onnxruntime.InferenceSession(node.model().SerializeToString(), options, ["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    result: Array = y
    return result


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"kernel": (3, 3), "pads": [1] * 4}, (1, 16, 60, 61)),  # several blocks of positions, filters, channels
        ({"kernel": (3, 3), "pads": [1] * 4, "strides": [2, 2]}, (70, 16, 31, 33)),  # several chunks of samples
        ({"kernel": (3,), "pads": [1, 1]}, (2, 16, 5000)),  # a row longer than a block
        ({"kernel": (1, 1)}, (3, 16, 40, 40)),
        ({"kernel": (1, 1)}, (3, 16, 41, 41)),
        ({"kernel": (2, 3, 3), "pads": [1] * 6, "group": 4}, (2, 16, 9, 17, 13)),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_planes_of_many_blocks(library: Path, attributes: dict[str, Any], shape: tuple[int, ...], threads: int) -> None:
    node = conv(n=48, channels=16, k=3, n_active=47, **attributes)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _compare(_run(node, x, threads), node, x)


def test_far_apart_taps_need_little_memory(library: Path) -> None:
    step = 2**20
    node = conv(n=1, channels=2**10, kernel=(3, 3, 3), k=1, n_active=1, pads=[step] * 6, dilations=[step] * 3)
    assert _run(node, np.ones((1, 2**10, 1, 1, 1), np.float32)).shape == (1, 1, 1, 1, 1)


@pytest.mark.slow
def test_scratch_beyond_memory_is_refused(library: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    node = conv(n=1, channels=1, kernel=(256, 256, 256), k=1, n_active=1, pads=[128] * 6, index_type="int32")
    (tmp_path / "model.onnx").write_bytes(node.model(fallback=False).SerializeToString())
    code = """
import resource, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, ["CPUExecutionProvider"])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    session.run(None, {"x": numpy.ones((1, 1, 1, 1, 1), numpy.float32)})
except Exception as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(library), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not enough memory for the padded input 'x'" in done.stdout
