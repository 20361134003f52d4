"""The operators, by library and by fallback, against the NumPy oracle."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ort_support.cases import CASES, sample, tolerance
from ort_support.models import WEIGHTS, Node, conv, linear

from srigl_fx.runtime import register


def _session(node: Node, *, library: bool, threads: int = 1, save_to: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    if library:
        register(options)
    return onnxruntime.InferenceSession(node.model().SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_library", [True, False], ids=["library", "fallback"])
def test_agrees_with_numpy(library: Path, name: str, by_library: bool) -> None:
    node, shapes = CASES[name]
    onnx.checker.check_model(node.model(), full_check=True)
    session = _session(node, library=by_library)
    for shape in shapes:
        x = sample(name, shape)
        (y,) = session.run(None, {"x": x})
        expected = node.expected(x)
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=tolerance(node))


@pytest.mark.parametrize("name", ["linear_wide", "conv2d_wide", "linear_wide_int8", "conv2d_wide_int8"])
@pytest.mark.parametrize("not_constant", [WEIGHTS, ("indices",), ("values", "bias"), ("active",)])
def test_weights_that_are_not_constant(library: Path, name: str, not_constant: tuple[str, ...]) -> None:
    node, shapes = CASES[name]
    node = node.replace(not_constant=frozenset(not_constant))
    for by_library in (True, False):
        session = _session(node, library=by_library)
        for shape in shapes:
            x = sample(name, shape)
            (y,) = session.run(None, node.feeds(x))
            np.testing.assert_allclose(y, node.expected(x), rtol=1e-6, atol=tolerance(node))


@pytest.mark.parametrize("name", ["linear_wide_int8", "conv2d_wide_int8"])
def test_scales_that_are_not_constant(library: Path, name: str) -> None:
    node, shapes = CASES[name]
    node = node.replace(not_constant=frozenset({"scales"}))
    for by_library in (True, False):
        session = _session(node, library=by_library)
        for shape, factor in itertools.product(shapes, (1, 2)):
            changed = node.with_weights(scales=node.weights["scales"] * np.float32(factor))
            x = sample(name, shape)
            (y,) = session.run(None, changed.feeds(x))
            np.testing.assert_allclose(y, changed.expected(x), rtol=1e-6, atol=factor * tolerance(node))


@pytest.mark.parametrize("name", [name for name, (_, shapes) in CASES.items() if "1d" not in name])
def test_fallback_folds_to_the_dense_operator(tmp_path: Path, name: str) -> None:
    node, _ = CASES[name]
    file = tmp_path / "optimized.onnx"
    _session(node, library=False, save_to=file)
    graph = onnx.load(file).graph
    kinds = {item.op_type for item in graph.node}
    linear_kinds, conv_kinds = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"}, {"Conv", "FusedConv"}
    assert kinds & (linear_kinds if node.op.startswith("CondensedLinear") else conv_kinds)
    left = {"ScatterElements", "ConstantOfShape", "Cast", "CondensedLinear", "CondensedConv"}
    assert not kinds & (left if node.used else left | {"Transpose"})


@pytest.mark.parametrize(
    "node",
    [linear(), conv(), linear().of_eight_bits(), conv().of_eight_bits()],
    ids=["linear", "conv", "linear_int8", "conv_int8"],
)
def test_library_takes_precedence_over_the_fallback(library: Path, tmp_path: Path, node: Node) -> None:
    file = tmp_path / "optimized.onnx"
    _session(node, library=True, save_to=file)
    assert [item.op_type for item in onnx.load(file).graph.node] == [node.op]


def test_not_a_number_and_infinity_pass_through(library: Path) -> None:
    node = linear(k=10, n_active=6)
    x = sample("nan", (3, 10))
    x[1, 4] = np.nan
    x[2, 5] = np.inf
    for repeats in (1, 20):  # rows, then tiles
        (y,) = _session(node, library=True).run(None, {"x": np.tile(x, (repeats, 1))})
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
        assert np.isinf(y[2]).all()


@pytest.mark.parametrize("name", ["linear_wide", "conv2d_wide", "linear_wide_int8", "conv2d_wide_int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_concurrent_runs_of_one_session(library: Path, name: str, threads: int) -> None:
    node, shapes = CASES[name]
    session = _session(node, library=True, threads=threads)
    inputs = [np.random.default_rng(i).standard_normal(shapes[i % len(shapes)]).astype(np.float32) for i in range(6)]
    expected = [node.expected(x) for x in inputs]
    start = threading.Barrier(4)

    def worker(worker_id: int) -> None:
        start.wait()
        for i in range(20):
            which = (worker_id + i) % len(inputs)
            (y,) = session.run(None, {"x": inputs[which]})
            np.testing.assert_allclose(y, expected[which], rtol=1e-6, atol=tolerance(node))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(worker, range(4)))


_step = st.integers(1, 3)


@st.composite
def _conv_nodes(draw: st.DrawFn) -> tuple[Node, tuple[int, ...]]:
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    group = draw(st.integers(1, 3))
    kernel = each(1, 3)
    n, group_channels = group * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    in_features = group_channels * int(np.prod(kernel))
    dilations, pads = each(1, 2), each(0, 2, 2 * rank)
    node = conv(
        n=n,
        channels=group * group_channels,
        kernel=kernel,
        group=group,
        k=draw(st.integers(0, in_features)),
        n_active=draw(st.integers(0, n)),
        index_type=draw(st.sampled_from(["uint16", "int32"])),
        strides=each(1, 3),
        pads=pads,
        dilations=dilations,
    )
    smallest = [
        max(1, dilation * (taps - 1) + 1 - before - after)
        for dilation, taps, before, after in zip(dilations, kernel, pads[:rank], pads[rank:], strict=True)
    ]
    sizes = [size + extra for size, extra in zip(smallest, each(0, 3), strict=True)]
    if draw(st.booleans()):
        node = node.of_eight_bits()
    return node, (draw(st.integers(0, 2)), group * group_channels, *sizes)


@pytest.mark.long
@given(case=_conv_nodes())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution(library: Path, case: tuple[Node, tuple[int, ...]]) -> None:
    node, shape = case
    x = sample("convolution", shape)
    expected = node.expected(x)
    for by_library in (True, False):
        (y,) = _session(node, library=by_library).run(None, {"x": x})
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
