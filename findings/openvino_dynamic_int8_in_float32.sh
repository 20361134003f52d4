#!/usr/bin/env bash
# onnxruntime's quantize_dynamic -> OpenVINO: a model of integer products is computed in float32.
#
# Expected: OpenVINO's CPU plugin reads the operators that `quantize_dynamic` writes (DynamicQuantizeLinear,
# MatMulInteger) and computes the products of bytes as such, or says that it does not; a file made for speed is then at
# least as fast as the float32 model that it was made of. It is in ONNX Runtime.
# Seen: the compiled model's products are FullyConnected of runtime precision f32, without a word, and the model is no
# faster than in float32: what rounds the activations and what scales the sums back is computed on top.
#
# Versions: openvino 2026.4.1, onnxruntime 1.31.1, onnx 1.23.2, Python 3.11. Seen on 2026-11-30, on an AMD EPYC (Zen 4).
# Output seen:
#     products: FullyConnected f32, FullyConnected f32, FullyConnected f32, FullyConnected f32
#     eight bits over float32: ONNX Runtime 3.8x as fast, OpenVINO 0.50x
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$work/venv/bin/pip" install --quiet openvino==2026.4.1
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import statistics
import sys
import time

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

SHAPE, LAYERS = [128, 768], 4
rng = np.random.default_rng(0)
nodes, weights, name = [], [], "x"
for i in range(LAYERS):
    weights.append(numpy_helper.from_array((rng.standard_normal((768, 768)) / 28).astype(np.float32), f"w{i}"))
    nodes.append(helper.make_node("MatMul", [name, f"w{i}"], [f"m{i}"]))
    nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"]))
    name = f"r{i}"
ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, SHAPE) for end in ("x", name)]
graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float32.onnx")
quantize_dynamic("float32.onnx", "int8.onnx", weight_type=QuantType.QInt8)
x = rng.standard_normal(SHAPE).astype(np.float32)


def seconds(call):
    for _ in range(5):
        call()
    found = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def in_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return seconds(lambda: session.run(None, {"x": x}))


def in_openvino(path):
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()
    return compiled, seconds(lambda: request.infer({"x": x}))


rounded, slow = in_openvino("int8.onnx")
gains = in_onnxruntime("float32.onnx") / in_onnxruntime("int8.onnx"), in_openvino("float32.onnx")[1] / slow
facts = [operation.get_rt_info() for operation in rounded.get_runtime_model().get_ops()]
kinds = [(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str)) for fact in facts if "layerType" in fact]
products = [" ".join(kind) for kind in kinds if kind[0] in ("FullyConnected", "MatMul")]
print(f"products: {', '.join(products)}")
print(f"eight bits over float32: ONNX Runtime {gains[0]:.1f}x as fast, OpenVINO {gains[1]:.2f}x")
as_described = len(products) == LAYERS and all(product.endswith(" f32") for product in products) and gains[1] < 1.3
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
