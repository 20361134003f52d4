"""Bytes between layers, operator by operator, in the library, in a stock ONNX Runtime and in ONNX's own evaluator.

Weights, samples and what is added are whole numbers, and scales powers of two, so that outputs are exact before they
are rounded: all hosts give the same bytes.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import SHAPES, condensed
from kernel_support.onnx_models import ConvOperator, LinearOperator, Operator
from kernel_support.whole_numbers import whole
from onnx import TensorProto, helper
from torch import Tensor

from srigl_fx.runtime import reference
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, fallback_functions
from srigl_fx.runtime.quantisation import round_with

HOSTS = {"library": (True, False), "stock": (False, False), "reference": (False, True)}
INS: dict[str, dict[str, Any]] = {
    "found": {},
    "given": {"x_scale": 0.5, "x_offset": 128},
    "bytes": {"x_scale": 0.5, "x_offset": 128, "x_bytes": 1},
}
offsets = pytest.mark.parametrize("offset", [0, 128])


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    library, by_reference = HOSTS[request.param]
    if library:
        request.getfixturevalue("library")  # built, or the test is skipped
    with np.errstate(invalid="ignore", over="ignore"):
        yield {"library": library, "reference": by_reference}


def samples(kind: str, *shape: int) -> Tensor:
    """Whole numbers of steps of 0.5, of which the largest needs no rounding in any sample; as bytes where asked."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-127, 128, (shape[0], math.prod(shape[1:])))
    if steps.size:
        steps[:, 0] = -127
    if kind == "bytes":
        return torch.from_numpy((steps + 128).astype(np.uint8).reshape(shape))
    return torch.from_numpy((0.5 * steps).astype(np.float32).reshape(shape))


def expected(weight: CondensedWeight, x: Tensor, rounding: dict[str, Any], **settings: Any) -> Any:
    given = {name: value for name, value in rounding.items() if name != "x_bytes"}
    parts = x.numpy(), weight.values, weight.indices, weight.active, weight.bias
    function: Any = reference.condensed_conv if "weight_shape" in settings else reference.condensed_linear
    return function(*parts, scales=weight.scales, **given, **settings)


@offsets
@pytest.mark.parametrize("kind", INS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n_active", [31, 0])
def test_linear(n_active: int, residual: bool, kind: str, offset: int, host: dict[str, Any]) -> None:
    weight = whole(condensed(37, 60, 10, n_active=n_active, dtype="int8"))
    rounding = {**INS[kind], "y_scale": 256.0, "y_offset": offset}
    operator = LinearOperator(weight, residual=residual, activation="relu6", rounding=rounding, **host)
    plain = LinearOperator(weight, residual=residual, rounding=rounding, **host)
    for batch in (0, 1, 5, 70):
        x = samples(kind, batch, 60)
        added = torch.randint(-99, 100, (batch, 37)).float() * 64 if residual else None
        for one, activation in ((operator, "relu6"), (plain, "none")):
            y = one.run(x=x, residual=added)
            given = {"residual": None if added is None else added.numpy(), "activation": activation}
            assert y.dtype is torch.uint8
            np.testing.assert_array_equal(y, expected(weight, x, rounding, **given))
    assert len(np.unique(y)) > (60 if n_active else 5)


@pytest.mark.parametrize("x_feature_major", [False, True])
@pytest.mark.parametrize("y_feature_major", [False, True])
@pytest.mark.parametrize("n_active", [31, 0])
def test_layouts(n_active: int, y_feature_major: bool, x_feature_major: bool, host: dict[str, Any]) -> None:
    weight = whole(condensed(37, 60, 10, n_active=n_active, dtype="int8"))
    rounding = {**INS["bytes"], "y_scale": 256.0, "y_offset": 128}
    layout: dict[str, Any] = {"x_feature_major": x_feature_major, "y_feature_major": y_feature_major}
    operator = LinearOperator(weight, residual=True, rounding=rounding, **layout, **host)
    for batch in (1, 5, 70):
        x, added = samples("bytes", batch, 60), torch.randint(-99, 100, (batch, 37)).float() * 64
        stored = operator.run(x=x.t() if x_feature_major else x, residual=added.t() if y_feature_major else added)
        y = stored.t() if y_feature_major else stored
        np.testing.assert_array_equal(y, expected(weight, x, rounding, residual=added.numpy()))


@pytest.mark.parametrize("kind", INS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["1d strided", "2d padded", "2d pointwise", "3d", "2d transposed, strided"])
def test_convolutions(name: str, residual: bool, kind: str, host: dict[str, Any]) -> None:
    shape = SHAPES[name]
    for n_active in (shape.n - 1, 0):
        weight = whole(shape.condensed(3, n_active=n_active, dtype="int8"))
        rounding = {**INS[kind], "y_scale": 128.0, "y_offset": 128}
        operator = ConvOperator(shape, weight, residual=residual, activation="relu", rounding=rounding, **host)
        x = samples(kind, 3, shape.channels, *shape.size)
        added = torch.randint(-99, 100, (3, shape.n, *shape.output_size)).float() * 64 if residual else None
        stride, padding, dilation = shape.steps
        geometry: dict[str, Any] = {"weight_shape": shape.weight_shape, "strides": stride, "pads": padding * 2}
        geometry |= {"dilations": dilation, "group": shape.groups, "transposed": shape.transposed}
        geometry |= {"output_padding": shape.output_padding or None, "activation": "relu"}
        y = operator.run(x=x, residual=added)
        geometry |= {"residual": None if added is None else added.numpy()}
        np.testing.assert_array_equal(y, expected(weight, x, rounding, **geometry))


def test_bytes_in_alone(host: dict[str, Any]) -> None:
    """Outputs are float32, as for samples that the operator rounds."""
    weight = whole(condensed(37, 60, 10, n_active=31, dtype="int8"))
    operator = LinearOperator(weight, rounding=INS["bytes"], **host)
    for batch in (1, 70):
        x = samples("bytes", batch, 60)
        np.testing.assert_array_equal(operator.run(x=x), expected(weight, x, INS["bytes"]))


@pytest.mark.usefixtures("library")
def test_tasks_that_share_outputs() -> None:
    weight = whole(condensed(300, 500, 60, n_active=277, dtype="int8"))
    rounding = {**INS["bytes"], "y_scale": 512.0, "y_offset": 128}
    for threads in (1, 2):
        operator = LinearOperator(weight, library=True, threads=threads, rounding=rounding)
        for batch in (1, 9, 64, 70, 150):
            x = samples("bytes", batch, 500)
            np.testing.assert_array_equal(operator.run(x=x), expected(weight, x, rounding))


def rounding_model(**attributes: Any) -> Any:
    node = helper.make_node(abi.ROUND, ["x"], ["y"], name="rounding", domain=abi.DOMAIN, **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    return helper.make_model(
        helper.make_graph([node], "graph", [x], [y]),
        opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(abi.DOMAIN, abi.DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        functions=fallback_functions([abi.ROUND]),
    )


@offsets
def test_rounding_alone(offset: int, host: dict[str, Any]) -> None:
    operator = Operator(rounding_model(x_scale=0.3, x_offset=offset), threads=1, **host)
    for shape in ((1,), (0, 3), (7, 5, 3), (70_001,)):
        x = 60 * torch.randn(shape)
        if x.numel() > 100:
            x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
        y = operator(x=x)
        assert y.shape == x.shape
        np.testing.assert_array_equal(y, round_with(x.numpy(), 0.3, offset))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"x_offset": 0}, "RoundSamples node 'rounding': attribute 'x_scale' is missing"),
        ({"x_scale": 0.0}, "attribute 'x_scale' must be a finite number of at least 2"),
        ({"x_scale": -1.0}, "attribute 'x_scale' must be a finite number"),
        ({"x_scale": math.nan}, "attribute 'x_scale' must be a finite number"),
        ({"x_scale": math.inf}, "attribute 'x_scale' must be a finite number"),
        ({"x_scale": 1e-31}, "attribute 'x_scale' must be a finite number"),
        ({"x_scale": 1}, "attribute 'x_scale' must be a float"),
        ({"x_scale": 1.0, "x_offset": 5}, "attribute 'x_offset' is 5, expected 0 or 128"),
    ],
)
def test_roundings_that_are_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        Operator(rounding_model(**attributes), library=True, threads=1)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_bytes": 2}, "attribute 'x_bytes' is 2, expected 0 or 1"),
        ({"x_bytes": -1}, "attribute 'x_bytes' is -1, expected 0 or 1"),
        ({"x_bytes": 1.0}, "attribute 'x_bytes' must be an int"),
        ({"x_scale": 0.0}, "attribute 'x_bytes' is 1 without an x_scale"),
        ({"y_scale": 0.0}, "attribute 'y_scale' must be a finite number of at least 2"),
        ({"y_scale": math.inf}, "attribute 'y_scale' must be a finite number"),
        ({"y_scale": 1}, "attribute 'y_scale' must be a float"),
        ({"y_offset": 127}, "attribute 'y_offset' is 127, expected 0 or 128"),
    ],
)
def test_attributes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    weight, shape = condensed(37, 60, 10, dtype="int8"), SHAPES["2d"]
    rounding = {**INS["bytes"], "y_scale": 0.5, "y_offset": 0}
    LinearOperator(weight, library=True, rounding=rounding)
    for make in (
        lambda: LinearOperator(weight, library=True, rounding=rounding | changes),
        lambda: ConvOperator(shape, shape.condensed(3, dtype="int8"), library=True, rounding=rounding | changes),
    ):
        with pytest.raises(Exception, match=message):
            make()


@pytest.mark.usefixtures("library")
def test_samples_of_another_type_are_refused() -> None:
    """Types that the graph does not know are known at the run."""
    weight = condensed(37, 60, 10, dtype="int8")
    for rounding, kind, message in (
        (INS["given"], TensorProto.UINT8, "input 'x' must be float32, not ONNX element type 2"),
        (INS["bytes"], TensorProto.FLOAT, "input 'x' must be uint8 where x_bytes is 1, not ONNX element type 1"),
        (INS["bytes"], TensorProto.INT8, "input 'x' must be uint8 where x_bytes is 1, not ONNX element type 3"),
    ):
        operator = LinearOperator(weight, library=True, rounding=rounding, x_type=kind)
        array = np.zeros((2, 60), helper.tensor_dtype_to_np_dtype(kind))
        with pytest.raises(Exception, match=message):
            operator.run.session.run(None, {"x": array})


def test_old_files_stay_valid(host: dict[str, Any]) -> None:
    """Nodes of before have no attribute that says whether x is rounded."""
    weight = whole(condensed(37, 60, 10, n_active=31, dtype="int8"))
    operator = LinearOperator(weight, rounding=INS["given"], **host)
    x = samples("given", 5, 60)
    np.testing.assert_array_equal(operator.run(x=x), expected(weight, x, INS["given"]))
