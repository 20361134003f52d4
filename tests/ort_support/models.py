"""One-node models of the two operators, with their weights and a NumPy oracle."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.runtime import reference
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, fallback_functions
from srigl_fx.runtime.quantisation import quantise_weights

Array = NDArray[Any]
WEIGHTS = ("values", "indices", "active", "bias")


@dataclass(frozen=True)
class Node:
    """A node: its operator, weight inputs and attributes. Everything may be replaced by something wrong."""

    op: str
    weights: Mapping[str, Array]
    attributes: Mapping[str, Any]
    x_rank: int
    inputs: Sequence[str] = ("x", *WEIGHTS)
    x_type: int = TensorProto.FLOAT
    not_constant: frozenset[str] = field(default_factory=frozenset)
    used: Sequence[str] = ()  # which of its optional attributes a node of its operator may use

    def replace(self, **changes: Any) -> "Node":
        return dataclasses.replace(self, **changes)

    def with_weights(self, **changes: Array) -> "Node":
        return self.replace(weights={**self.weights, **changes})

    def with_attributes(self, **changes: Any) -> "Node":
        """Attributes replaced, or left out where the new value is None."""
        merged = {**self.attributes, **changes}
        return self.replace(attributes={name: value for name, value in merged.items() if value is not None})

    def model(self, *, fallback: bool = True) -> onnx.ModelProto:
        """The model; weights in ``not_constant`` become inputs of the graph."""
        node = helper.make_node(self.op, list(self.inputs), ["y"], name="layer", domain="srigl_fx")
        for name, value in self.attributes.items():
            if isinstance(value, onnx.AttributeProto):
                node.attribute.append(value)
            else:
                plain = [int(item) for item in value] if isinstance(value, list | tuple) else value
                kind = onnx.AttributeProto.INTS if isinstance(plain, list) else None
                node.attribute.append(helper.make_attribute(name, plain, attr_type=kind))
        graph_inputs = [helper.make_tensor_value_info("x", self.x_type, [None] * self.x_rank)]
        initializers = []
        for name, array in self.weights.items():
            if name in self.not_constant:
                element_type = helper.np_dtype_to_tensor_dtype(array.dtype)
                graph_inputs.append(helper.make_tensor_value_info(name, element_type, [None] * array.ndim))
            else:
                initializers.append(numpy_helper.from_array(array, name))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * self.x_rank)
        graph = helper.make_graph([node], "graph", graph_inputs, [y], initializers)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid("srigl_fx", 1)],
            ir_version=IR_VERSION,
            functions=fallback_functions(used={self.op: self.used}) if fallback else [],
        )

    def feeds(self, x: Array) -> dict[str, Array]:
        return {"x": x, **{name: self.weights[name] for name in self.not_constant}}

    def expected(self, x: Array) -> Array:
        weights = [self.weights[name] for name in WEIGHTS]
        eight_bits: dict[str, Any] = {"scales": self.weights.get(abi.SCALES)}
        eight_bits |= {"x_scale": self.attributes.get("x_scale") or None}
        eight_bits |= {"x_offset": self.attributes.get("x_offset", 0)}
        if self.op.removesuffix(abi.EIGHT_BITS) == "CondensedLinear":
            return reference.condensed_linear(x, *weights, **eight_bits)
        names = ("weight_shape", "strides", "pads", "dilations", "group")
        given = {name: self.attributes[name] for name in names if name in self.attributes}
        return reference.condensed_conv(x, *weights, **given | eight_bits)

    def of_eight_bits(self) -> "Node":
        """The operator with values of eight bits, and these weights rounded to them."""
        values, scales = quantise_weights(self.weights["values"])
        node = self.with_weights(values=values, scales=scales)
        return node.replace(op=self.op + abi.EIGHT_BITS, inputs=(*self.inputs, abi.SCALES))

    def rounding_with(self, scale: float, offset: int) -> "Node":
        """The operator with values of eight bits, and samples rounded with a given scale."""
        return self.of_eight_bits().with_attributes(x_scale=scale, x_offset=offset).replace(used=("x_scale",))


def random_weights(
    rng: np.random.Generator, n: int, in_features: int, k: int, n_active: int, index_type: str = "uint16"
) -> dict[str, Array]:
    """Random condensed weights; the bias is far from zero everywhere."""
    rows = [np.sort(rng.choice(in_features, k, replace=False)) for _ in range(n_active)]
    return {
        "values": rng.standard_normal((n_active, k)).astype(np.float32),
        "indices": np.array(rows, index_type).reshape(n_active, k),
        "active": np.sort(rng.choice(n, n_active, replace=False)).astype(np.int32),
        "bias": (rng.standard_normal(n) + 3).astype(np.float32),
    }


def linear(
    *, n: int = 6, in_features: int = 10, k: int = 3, n_active: int = 4, x_rank: int = 2, index_type: str = "uint16"
) -> Node:
    """A CondensedLinear."""
    weights = random_weights(np.random.default_rng(n + k), n, in_features, k, n_active, index_type)
    attributes = {"in_features": in_features, "weight_shape": [n, in_features], "flat_size": n * in_features}
    return Node("CondensedLinear", weights, attributes, x_rank)


def conv(
    *,
    n: int = 6,
    channels: int = 4,
    kernel: Sequence[int] = (3, 2),
    group: int = 1,
    k: int = 3,
    n_active: int = 4,
    index_type: str = "uint16",
    **attributes: Any,
) -> Node:
    """A CondensedConv; further attributes (strides, pads, dilations) as given, else ONNX's defaults."""
    in_features = channels // group * int(np.prod(kernel))
    weights = random_weights(np.random.default_rng(n + k), n, in_features, k, n_active, index_type)
    rank = len(kernel)
    everything = {
        "in_features": in_features,
        "weight_shape": [n, channels // group, *kernel],
        "flat_size": n * in_features,
        "strides": [1] * rank,
        "pads": [0] * 2 * rank,
        "dilations": [1] * rank,
        "group": group,
        **attributes,
    }
    return Node("CondensedConv", weights, everything, rank + 2)
