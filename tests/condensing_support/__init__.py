"""ONNX files whose weights hold zeros, as exporters write them, and whether condensed ones compute the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.runtime import load
from srigl_fx.runtime.ort.abi import DOMAIN

Array = NDArray[Any]


def pruned(*shape: int, density: float = 0.1, even: bool = True, seed: int = 0) -> Array:
    """A weight (n, ...) of which each row keeps as many entries, or any entries of the whole are kept."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    scores = rng.random(matrix.shape) if even else rng.random(matrix.size)
    least = np.quantile(scores, 1 - density, axis=-1, keepdims=True)
    return np.where((scores >= least).reshape(matrix.shape), matrix, 0).astype(np.float32).reshape(shape)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    arrays: dict[str, Array],
    x: Sequence[int | str | None],
    y: Sequence[int | str | None],
    *,
    opset: int = 18,
    inputs: Sequence[Any] = (),
) -> Path:
    """A file of a graph from x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in nodes} - {""})]
    model = helper.make_model(graph, opset_imports=imports, ir_version=7 if opset < 15 else 9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def condensed_nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if node.domain == DOMAIN]


def assert_same(source: Path, condensed: Path, *inputs: Array) -> None:
    """With the library, and on a stock ONNX Runtime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # further ones round samples
    paths, providers = (source, condensed), ["CPUExecutionProvider"]
    stock = [ort.InferenceSession(str(path), options, providers=providers) for path in paths]
    for session in (stock[1], load(condensed)):
        for x in inputs:
            expected, got = (one.run(None, {"x": x})[0] for one in (stock[0], session))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def random(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
