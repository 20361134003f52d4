"""The layers that are measured: random weights under random constant fan-in masks, as arrays and as ONNX files.

Owns what is computed. It must not know who computes it, nor how long that takes.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION
from srigl_fx.runtime.quantisation import quantise_weights

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer, or a convolution over images where ``kernel`` is given.

    Attributes:
        inputs: Input features, or channels.
        outputs: Output features, or channels.
        kernel: Height and width of the filters; 0 for a linear layer.
        size: Height and width of the images.
        stride: Of the convolution; its padding is ``kernel // 2``.
    """

    inputs: int
    outputs: int
    kernel: int = 0
    size: int = 0
    stride: int = 1

    @property
    def fan_in(self) -> int:
        return self.inputs * max(1, self.kernel) ** 2

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def positions(self) -> int:
        """Output positions of a sample: how often each weight is used."""
        if not self.kernel:
            return 1
        return int(((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        spatial = (self.kernel, self.kernel) if self.kernel else ()
        return self.outputs, self.inputs, *spatial

    def input_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.inputs, self.size, self.size) if self.kernel else (batch, self.inputs)

    def __str__(self) -> str:
        if not self.kernel:
            return f"{self.inputs} -> {self.outputs}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.inputs} -> {self.outputs}, {self.size}x{self.size}{stride}"


def random_weight(layer: Layer, sparsity: float, seed: int = 0, group_size: int = 1) -> CondensedWeight:
    """A constant fan-in weight whose outputs have a variance of about one, and share their inputs in groups."""
    rng = np.random.default_rng(seed)
    fan_in = max(1, round((1 - sparsity) * layer.fan_in))
    groups = -(-layer.outputs // group_size)
    kept = np.sort(rng.random((groups, layer.fan_in)).argpartition(fan_in - 1, axis=1)[:, :fan_in], axis=1)
    kept = np.repeat(kept, group_size, axis=0)[: layer.outputs]
    mask = np.zeros((layer.outputs, layer.fan_in), np.bool_)
    np.put_along_axis(mask, kept, True, axis=1)
    weight = (rng.standard_normal(mask.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)
    return CondensedWeight.from_dense(weight, mask, rng.standard_normal(layer.outputs))


def in_eight_bits(weight: CondensedWeight) -> CondensedWeight:
    """The same weight with int8 values and a scale for each row."""
    values, scales = quantise_weights(weight.values)
    return replace(weight, values=values, scales=scales)


def random_input(layer: Layer, batch: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(layer.input_shape(batch), np.float32)


def dense_weight(weight: CondensedWeight, layer: Layer) -> Array:
    """The same weight with its zeros."""
    return weight.to_dense()[0].reshape(layer.weight_shape)


def _model(
    layer: Layer, node: onnx.NodeProto, arrays: dict[str, Array], opset: int, ir_version: int, ours: bool
) -> bytes:
    output = ["batch", layer.outputs, *([None] * 2 if layer.kernel else [])]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *layer.input_shape(1)[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("srigl_fx", 1)] if ours else [])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    return bytes(model.SerializeToString())


def dense_onnx(layer: Layer, weight: CondensedWeight) -> bytes:
    """The layer as standard ONNX with its zeros in place; opset 13 and IR 8, which DeepSparse 1.8 reads."""
    arrays = {"weight": dense_weight(weight, layer), "bias": weight.bias}
    if layer.kernel:
        node = helper.make_node("Conv", ["x", *arrays], ["y"], strides=[layer.stride] * 2, pads=[layer.padding] * 4)
    else:
        node = helper.make_node("Gemm", ["x", *arrays], ["y"], transB=1)
    return _model(layer, node, arrays, 13, 8, ours=False)


def condensed_onnx(layer: Layer, weight: CondensedWeight, *, bf16: bool = False) -> bytes:
    """The layer as one condensed operator; with ``bf16``, float32 values are stored as bfloat16."""
    arrays = {name: getattr(weight, name) for name in ("values", "indices", "active", "bias")}
    if weight.scales is not None:
        arrays["scales"] = weight.scales
    if bf16:
        arrays["values"] = arrays["values"].astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    attributes: dict[str, Any] = {
        "in_features": weight.in_features,
        "weight_shape": list(layer.weight_shape),
        "flat_size": weight.in_features * weight.out_features,
    }
    if layer.kernel:
        attributes |= {
            "strides": [layer.stride] * 2,
            "pads": [layer.padding] * 4,
            "dilations": [1, 1],
            "group": 1,
        }
    name = ("CondensedConv" if layer.kernel else "CondensedLinear") + ("" if weight.scales is None else "Int8")
    node = helper.make_node(name, ["x", *arrays], ["y"], domain="srigl_fx", **attributes)
    return _model(layer, node, arrays, OPSET_VERSION, IR_VERSION, ours=True)
