"""The condensed operators in ONNX Runtime, as one-node models, compared with the NumPy oracle."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from kernel_support import Convolution, compare_conv, compare_linear
from srigl_fx.runtime import register
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, SHARED, fallback_functions

_ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
}


def _arrays(weight: CondensedWeight) -> dict[str, NDArray[Any]]:
    """A weight's parts, in the order of an operator's inputs."""
    parts = {"values": weight.values, "indices": weight.indices, "active": weight.active, "bias": weight.bias}
    return parts if weight.scales is None else parts | {abi.SCALES: weight.scales}


def _base(base: str, weight: CondensedWeight, rounding: Mapping[str, Any]) -> str:
    if weight.scales is None:
        return base
    return base + abi.EIGHT_BITS + (abi.BYTES if "y_scale" in rounding else "")


def _model(
    name: str,
    weight: CondensedWeight,
    attributes: dict[str, Any],
    ranks: tuple[int, int],
    *,
    constant: bool,
    x_type: int | None = None,
) -> onnx.ModelProto:
    """One operator; its ``ranks`` are those of x and y. The weight is a set of initializers, or of inputs.

    ``x`` is declared as what the attributes say, or of another type.
    """
    arrays = _arrays(weight)
    tensors = [
        helper.make_tensor(part, _ELEMENT_TYPES[array.dtype.name], array.shape, array.tobytes(), raw=True)
        for part, array in arrays.items()
    ]
    _, residual, _ = abi.operator_names()[name]
    shape = (weight.out_features, weight.in_features)
    shared: dict[str, Any] = {
        "in_features": weight.in_features,
        "weight_shape": shape,
        "flat_size": shape[0] * shape[1],
    }
    inputs = {"x": ranks[0], **({"residual": ranks[1]} if residual else {})}
    node = helper.make_node(
        name, ["x", *arrays, *list(inputs)[1:]], ["y"], name="layer", domain=abi.DOMAIN, **(shared | attributes)
    )
    x_type = x_type or (TensorProto.UINT8 if attributes.get("x_bytes") == 1 else TensorProto.FLOAT)
    graph_inputs = [
        helper.make_tensor_value_info(item, x_type if item == "x" else TensorProto.FLOAT, [None] * rank)
        for item, rank in inputs.items()
    ]
    if not constant:
        graph_inputs += [helper.make_tensor_value_info(part.name, part.data_type, part.dims) for part in tensors]
    stored = TensorProto.UINT8 if "y_scale" in attributes else TensorProto.FLOAT
    y = helper.make_tensor_value_info("y", stored, [None] * ranks[1])
    used = [part for part in ("x_perm", "y_perm", "x_scale", "x_bytes") if part in attributes]
    return helper.make_model(
        helper.make_graph([node], "graph", graph_inputs, [y], tensors if constant else []),
        opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(abi.DOMAIN, abi.DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        functions=fallback_functions([name], {name: [*used, *([SHARED] if weight.active.ndim == 2 else [])]}),
    )


class Operator:
    """A session of one operator, by the library or by the fallback that the model carries.

    The fallback is run by ONNX Runtime or, with ``reference``, by ONNX's own evaluator.
    """

    def __init__(self, model: onnx.ModelProto, *, library: bool, threads: int, reference: bool = False) -> None:
        self.session: Any
        if reference:
            self.session = ReferenceEvaluator(model)
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if library:
            register(options)
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def __call__(self, **inputs: Tensor | None) -> Tensor:
        given = {name: np.ascontiguousarray(item.numpy()) for name, item in inputs.items() if item is not None}
        (y,) = self.session.run(None, given)
        return torch.from_numpy(y)


class LinearOperator:
    """A condensed linear layer of one rank, epilogue and layout, for any batch."""

    def __init__(
        self,
        weight: CondensedWeight,
        *,
        library: bool,
        rank: int = 2,
        residual: bool = False,
        activation: str = "none",
        x_feature_major: bool = False,
        y_feature_major: bool = False,
        threads: int = 1,
        constant: bool = True,
        reference: bool = False,
        rounding: Mapping[str, Any] = MappingProxyType({}),
        x_type: int | None = None,
    ) -> None:
        usual = list(range(rank))
        self.weight, self.residual, self.activation, self.constant = weight, residual, activation, constant
        self.x_feature_major, self.y_feature_major = x_feature_major, y_feature_major
        attributes = {
            "x_perm": [*usual[1:], 0] if x_feature_major else usual,
            "y_perm": [rank - 1, *usual[:-1]] if y_feature_major else usual,
            **rounding,
        }
        name = abi.operator_name(_base("CondensedLinear", weight, rounding), residual, activation)
        model = _model(name, weight, attributes, (rank, rank), constant=constant, x_type=x_type)
        self.run = Operator(model, library=library, threads=threads, reference=reference)

    def check(self, x: Tensor) -> Tensor:
        """Compare with the oracle for ``x`` (..., in_features) and a random residual; return the result."""
        residual = 3 * torch.randn(*x.shape[:-1], self.weight.out_features) if self.residual else None
        given = {} if self.constant else weight_inputs(self.weight)
        laid_out = residual.movedim(-1, 0) if residual is not None and self.y_feature_major else residual
        stored = self.run(x=x.movedim(-1, 0) if self.x_feature_major else x, residual=laid_out, **given)
        y = stored.movedim(0, -1) if self.y_feature_major else stored
        compare_linear(y, self.weight, x, residual, self.activation)
        return y


def _arrange(model: onnx.ModelProto) -> None:
    """Put operators that arrange samples before and behind the only node."""
    (node,) = model.graph.node
    del model.graph.node[:]
    for place, name in enumerate(node.input):
        if name in ("x", "residual"):
            inner = node.input[place] = f"arranged_{name}"
            model.graph.node.append(helper.make_node(abi.ARRANGE, [name], [inner], domain=abi.DOMAIN, name=inner))
    node.output[0] = "arranged_y"
    back = helper.make_node(abi.ARRANGE, ["arranged_y"], ["y"], domain=abi.DOMAIN, name="back", back=1)
    model.graph.node.extend([node, back])
    model.functions.extend(fallback_functions([abi.ARRANGE]))


class ConvOperator:
    """A condensed convolution with one epilogue, for any batch."""

    def __init__(
        self,
        shape: Convolution,
        weight: CondensedWeight,
        *,
        library: bool,
        residual: bool = False,
        activation: str = "none",
        threads: int = 1,
        constant: bool = True,
        reference: bool = False,
        rounding: Mapping[str, Any] = MappingProxyType({}),
        arranged: bool = False,
    ) -> None:
        stride, padding, dilation = shape.steps
        self.shape, self.weight, self.constant = shape, weight, constant
        self.residual, self.activation = residual, activation
        attributes: dict[str, Any] = {
            "weight_shape": shape.weight_shape,
            "strides": stride,
            "pads": padding * 2,
            "dilations": dilation,
            "group": shape.groups,
            **rounding,
        }
        if shape.transposed:
            attributes["output_padding"] = shape.output_padding or (0,) * shape.rank
        base = _base("CondensedConvTranspose" if shape.transposed else "CondensedConv", weight, rounding)
        name = abi.operator_name(base, residual, activation)
        ranks = shape.rank + 2, shape.rank + 2
        if arranged:
            attributes["arranged"] = 1
        model = _model(name, weight, attributes, ranks, constant=constant)
        if arranged:
            _arrange(model)
        self.run = Operator(model, library=library, threads=threads, reference=reference)

    def check(self, x: Tensor) -> Tensor:
        """Compare with the oracle for ``x`` and a random residual; return the result."""
        residual = 3 * torch.randn(x.shape[0], self.shape.n, *self.shape.output_size) if self.residual else None
        y = self.run(x=x, residual=residual, **({} if self.constant else weight_inputs(self.weight)))
        compare_conv(y, self.shape, self.weight, x, residual, self.activation)
        return y


def weight_inputs(weight: CondensedWeight) -> dict[str, Tensor]:
    """A weight's parts as inputs of a session; its values must be float32 or int8."""
    return {name: torch.from_numpy(array) for name, array in _arrays(weight).items()}
