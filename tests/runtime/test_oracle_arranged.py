"""Convolutions and pooling whose samples are arranged, and what arranges them, against the oracle, in torch and in ONNX
Runtime.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, PATTERNS, SHAPES, Convolution, axes, check_conv, misaligned
from kernel_support.onnx_models import ConvOperator, Operator
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.arranged import arrange, arrange_back, block_samples, pool
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import ValueDtype
from srigl_fx.runtime.ops import ARRANGE, POOL
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, fallback_functions
from srigl_fx.runtime.validation import check_arranged
from srigl_fx.runtime.value_types import FLOATS

FLAT = {name: shape for name, shape in SHAPES.items() if shape.rank < 3 and not shape.transposed}
BATCHES = (0, 1, 7, 8, 9, 15, 16, 17, 33)
every_shape = pytest.mark.parametrize("shape", FLAT.values(), ids=FLAT)
dtypes = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture(params=[True, False], ids=["library", "fallback"])
def by_library(request: pytest.FixtureRequest) -> bool:
    if request.param:
        request.getfixturevalue("library")  # built, or the test is skipped
    return bool(request.param)


@pytest.mark.parametrize("sizes", [(1,), (7,), (16,), (33,), (3, 5), (4, 4), (2, 3, 4)])
def test_where_each_number_goes(sizes: tuple[int, ...]) -> None:
    for batch, channels in itertools.product(BATCHES, (1, 3, 17)):
        x = torch.randn(batch, channels, *sizes)
        flat, block = x.flatten(2).numpy(), block_samples()
        whole = batch // block * block
        expected = [
            flat[first + sample, channel, position]
            for first in range(0, whole, block)
            for position in range(flat.shape[2] if whole else 0)
            for channel in range(channels)
            for sample in range(block)
        ]
        y = ARRANGE(x)
        assert y.flatten().tolist() == [*expected, *flat[whole:].ravel().tolist()]
        assert torch.equal(arrange(x), y)
        assert torch.equal(ARRANGE(y, True), x)
        assert torch.equal(arrange_back(y), x)
        assert torch.equal(ARRANGE(misaligned(x)), y)


def test_more_threads_than_blocks_arrange_the_same() -> None:
    x = torch.randn(16, 24, 40, 40)
    with torch_threads(3):
        assert torch.equal(ARRANGE(x), arrange(x))


@dtypes
@every_shape
def test_shapes(shape: Convolution, dtype: ValueDtype) -> None:
    for k, n_active in ((1, 1), (3, shape.n - 1), (shape.in_features, shape.n), (2, 0)):
        weight = shape.condensed(min(k, shape.in_features), n_active=n_active, dtype=dtype)
        check_conv(shape, weight, shape.input(16), is_arranged=True)


@pytest.mark.parametrize("name", ["2d padded", "2d pointwise", "2d strided", "1d strided", "2d groups"])
def test_batches(name: str) -> None:
    shape = FLAT[name]
    weight = shape.condensed(3, n_active=shape.n - 1)
    for batch in BATCHES:
        check_conv(shape, weight, shape.input(batch), is_arranged=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["2d padded", "2d pointwise", "2d groups"])
def test_epilogues(name: str, activation: str) -> None:
    shape = FLAT[name]
    weight, x = shape.condensed(3, n_active=shape.n - 1), shape.input(17)
    y = check_conv(shape, weight, x, activation=activation, is_arranged=True)
    for residual in (torch.randn(y.shape), misaligned(torch.randn(y.shape))):
        check_conv(shape, weight, x, residual=residual, activation=activation, is_arranged=True)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_widths(kernel: int) -> None:
    """Rows that end before, at and after a strip."""
    for width in axes(3, 4, 8):
        if width >= kernel:
            shape = Convolution(n=17, channels=3, kernel=(2, kernel), padding=(1, kernel // 2), size=(2, width))
            check_conv(shape, shape.condensed(2, n_active=16), shape.input(16), is_arranged=True)


@pytest.mark.parametrize("channels", [255, 256, 257, 600])
def test_several_windows_of_channels(channels: int) -> None:
    for kernel in (1, 3):
        shape = Convolution(n=20, channels=channels, kernel=(kernel,) * 2, padding=(kernel // 2,) * 2, size=(3, 5))
        for k in (1, 90):
            check_conv(shape, shape.condensed(k, n_active=18), shape.input(16), is_arranged=True)


@pytest.mark.parametrize("padding", [(3, 0), (0, 4), (7, 7)])
def test_positions_that_read_nothing_but_padding(padding: tuple[int, int]) -> None:
    shape = Convolution(n=17, channels=2, padding=padding, dilation=(2, 1), size=(5, 3))
    weight, x = shape.condensed(9), shape.input(16)
    y = check_conv(shape, weight, x, is_arranged=True)
    check_conv(shape, weight, x, residual=torch.randn(y.shape), activation="gelu", is_arranged=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_adversarial_masks(pattern: str) -> None:
    shape = Convolution(n=40, channels=40, groups=2, padding=(1, 1), size=(6, 7))
    for k in (1, 9, 20):
        check_conv(shape, shape.condensed(k, n_active=37, pattern=pattern), shape.input(16), is_arranged=True)


@pytest.mark.parametrize("groups", [(4, 1, 3), (4,), (8,), (5,), (2,)], ids=str)
@pytest.mark.parametrize("name", ["2d padded", "2d pointwise", "2d strided, dilated"])
def test_rows_that_share_their_inputs(name: str, groups: tuple[int, ...]) -> None:
    geometry = FLAT[name]
    shape = dataclasses.replace(geometry, n=37, channels=20)
    for n_active in (37, 35, 3):  # those that are ablated lie among others
        weight = shape.condensed(9, n_active=n_active, groups=groups)
        y = check_conv(shape, weight, shape.input(18), is_arranged=True)
        check_conv(shape, weight, shape.input(18), residual=torch.randn(y.shape), activation="silu", is_arranged=True)


def test_rows_that_share_their_inputs_across_groups_of_filters() -> None:
    """Fours end where a group of filters does, and with windows of channels."""
    for shape in (Convolution(n=18, channels=6, groups=3, padding=(1, 1)), Convolution(n=9, channels=600, size=(3, 4))):
        for k in (1, 4):
            weight = shape.condensed(k, n_active=shape.n - 1, groups=(4,))
            check_conv(shape, weight, shape.input(16), is_arranged=True)


def test_inputs_that_are_not_finite() -> None:
    shape = Convolution(n=20, channels=12, padding=(1, 1), size=(5, 6))
    weight, x = shape.condensed(5, n_active=18), shape.input(33)
    x[0, 0, 0, 0], x[15, 3, 2, 2], x[16, 7, 4, 5], x[32, 1, 1, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    check_conv(shape, weight, x, activation="relu", is_arranged=True)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_positions(threads: int) -> None:
    shape = Convolution(n=80, channels=40, padding=(1, 1), size=(10, 13))
    weight = shape.condensed(30, n_active=77)
    with torch_threads(threads):
        for batch in (16, 33, 48):
            y = check_conv(shape, weight, shape.input(batch), is_arranged=True)
            check_conv(shape, weight, shape.input(batch), residual=torch.randn(y.shape), is_arranged=True)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    def two(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    kernel, dilation, padding, size = two(1, 4), two(1, 3), two(0, 4), two(1, 9)
    reach = [(taps - 1) * d + 1 for taps, d in zip(kernel, dilation, strict=True)]
    size = tuple(max(s, r - 2 * p) for s, r, p in zip(size, reach, padding, strict=True))  # type: ignore[assignment]
    groups = data.draw(st.integers(1, 3))
    shape = Convolution(
        n=groups * data.draw(st.integers(1, 20)),
        channels=groups * data.draw(st.integers(1, 5)),
        groups=groups,
        kernel=kernel,
        stride=two(1, 3),
        padding=padding,
        dilation=dilation,
        size=size,
    )
    k = data.draw(st.integers(1, shape.in_features))
    weight = shape.condensed(k, n_active=data.draw(st.integers(0, shape.n)), seed=data.draw(st.integers(0, 99)))
    check_conv(shape, weight, shape.input(data.draw(st.integers(14, 34))), is_arranged=True)


@pytest.mark.parametrize("name", ["2d padded", "2d pointwise", "1d strided", "2d groups", "2d strided, dilated"])
def test_in_onnxruntime(name: str, by_library: bool) -> None:
    shape = FLAT[name]
    for residual, activation in ((False, "none"), (True, "relu"), (True, "silu")):
        weight = shape.condensed(3, n_active=shape.n - 1)
        operator = ConvOperator(
            shape, weight, library=by_library, residual=residual, activation=activation, arranged=True
        )
        for batch in BATCHES:
            operator.check(shape.input(batch))


@dtypes
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.usefixtures("library")
def test_values_of_onnxruntime(constant: bool, dtype: ValueDtype) -> None:
    shape = Convolution(n=37, channels=20, padding=(1, 1), size=(12, 14))
    weight = shape.condensed(30, n_active=33, dtype=dtype if constant else "float32")
    operator = ConvOperator(shape, weight, library=True, residual=True, threads=2, constant=constant, arranged=True)
    for batch in (17, 64, 48):
        operator.check(shape.input(batch))


def test_gradients_are_those_of_samples_as_they_are() -> None:
    shape = Convolution(n=20, channels=6, padding=(1, 1), stride=(2, 1), size=(5, 6))
    weight, x = shape.condensed(5, n_active=18), shape.input(17)
    residual = torch.randn(17, 20, *shape.output_size)
    parts = [torch.from_numpy(part) for part in (weight.values, weight.indices, weight.active, weight.bias)]
    stride, padding, dilation = shape.steps
    found = []
    for is_arranged in (False, True):
        leaves = [one.clone().requires_grad_() for one in (x, parts[0], parts[3], residual)]
        a, values, bias, b = leaves
        before, after = (ARRANGE, lambda y: ARRANGE(y, True)) if is_arranged else (torch.clone, torch.clone)
        y = torch.ops.srigl_fx.condensed_conv(
            *(before(a), values, parts[1], parts[2], bias, shape.weight_shape, stride, padding, dilation, 1),
            residual=before(b),
            activation="gelu",
            arranged=is_arranged,
        )
        (after(y) * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [("3d", "one or two axes"), ("2d transposed", "not transposed"), ("2d padded", "values of floats")],
)
def test_what_cannot_be_arranged(name: str, words: str) -> None:
    shape = SHAPES[name]
    weight = shape.condensed(3, dtype="int8" if name == "2d padded" else "float32")
    with pytest.raises(FormatError, match=words):
        check_conv(shape, weight, shape.input(16), is_arranged=True)


def test_samples_that_cannot_be_arranged() -> None:
    for x in (torch.randn(16, 3), torch.randn(16, 3, 4).double()):
        with pytest.raises(FormatError, match=r"float32 \(N, C, sizes\.\.\.\)"):
            ARRANGE(x)


@pytest.mark.parametrize(
    ("weight_shape", "dilation"), [((1 << 25, 1, 1, 1), 1), ((4, 1 << 20, 1, 17), 1), ((4, 3, 1, 2), 1 << 30)]
)
def test_sizes_whose_places_no_panel_can_hold(weight_shape: tuple[int, ...], dilation: int) -> None:
    with pytest.raises(FormatError, match="too many for arranged samples"):
        check_arranged("condensed_conv", True, weight_shape, (1, dilation), 1, False, None)


class Pooling(NamedTuple):
    """What is pooled, and how."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    mean: bool = False

    def by_hand(self, x: Tensor) -> NDArray[Any]:
        """The result, window by window."""
        borders = [(0, 0), (0, 0), *((p, p) for p in self.padding)]
        padded = np.pad(x.numpy(), borders, constant_values=0.0 if self.mean else -np.inf)
        reach = [d * (w - 1) + 1 for d, w in zip(self.dilation, self.window, strict=True)]
        sizes = [(n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, self.stride, strict=True)]
        y = np.empty((*x.shape[:2], *sizes), np.float32)
        for place in np.ndindex(*sizes):
            taps = zip(place, self.stride, reach, self.dilation, strict=True)
            slices: tuple[Any, ...] = tuple(slice(p * s, p * s + r, d) for p, s, r, d in taps)
            window = padded[(..., *slices)]
            axes = tuple(range(2, window.ndim))
            y[(..., *place)] = window.mean(axes) if self.mean else window.max(axes)
        return y

    def model(self, **changes: Any) -> Any:
        """An operator between such as arrange samples, as a model."""
        attributes: dict[str, Any] = {"kernel_shape": self.window, "strides": self.stride, "pads": self.padding * 2}
        name = abi.MEAN_POOL if self.mean else abi.MAX_POOL
        attributes |= ({} if self.mean else {"dilations": self.dilation}) | changes
        nodes = [
            helper.make_node(abi.ARRANGE, ["x"], ["a"], domain=abi.DOMAIN),
            helper.make_node(
                name, ["a"], ["b"], "pooling", domain=abi.DOMAIN, **{k: v for k, v in attributes.items() if v != ()}
            ),
            helper.make_node(abi.ARRANGE, ["b"], ["y"], domain=abi.DOMAIN, back=1),
        ]
        x, y = (helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in "xy")
        return helper.make_model(
            helper.make_graph(nodes, "graph", [x], [y]),
            opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(abi.DOMAIN, 1)],
            ir_version=IR_VERSION,
            functions=fallback_functions([abi.ARRANGE, name]),
        )


POOLINGS = {
    "of a ResNet": Pooling((9, 11), (3, 3), (2, 2), (1, 1), (1, 1)),
    "uneven": Pooling((9, 10), (2, 3), (3, 1), (0, 1), (1, 1)),
    "dilated": Pooling((9, 11), (3, 2), (1, 2), (1, 1), (3, 2)),
    "one axis": Pooling((37,), (4,), (3,), (2,), (2,)),
    "one position": Pooling((3, 2), (3, 2), (1, 1), (0, 0), (1, 1)),
    "mean": Pooling((8, 6), (2, 2), (2, 2), (0, 0), (1, 1), True),
    "mean, padded": Pooling((5, 7), (3, 3), (1, 2), (1, 1), (1, 1), True),
    "mean of an image": Pooling((7, 5), (7, 5), (7, 5), (0, 0), (1, 1), True),
    "mean, one axis": Pooling((19,), (5,), (2,), (2,), (1,), True),
}
every_pooling = pytest.mark.parametrize("how", POOLINGS.values(), ids=POOLINGS)


@every_pooling
def test_pooling(how: Pooling) -> None:
    for batch, channels in itertools.product(BATCHES, (1, 3, 17)):
        x = torch.randn(batch, channels, *how.size)
        if batch > 1:
            x[0, 0], x[batch - 1, -1, 0], x[batch // 2, 0, -1] = torch.nan, -torch.inf, torch.inf
        for arranged in (arrange(x), misaligned(arrange(x))):
            y = arrange_back(POOL(arranged, *how[1:]))
            np.testing.assert_allclose(y, how.by_hand(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_what_is_pooled(threads: int) -> None:
    with torch_threads(threads):
        for how in (
            Pooling((40, 41), (3, 3), (2, 2), (1, 1), (1, 1)),
            Pooling((20, 20), (9, 9), (1, 1), (4, 4), (1, 1)),
        ):
            x = torch.randn(19, 24, *how.size)
            np.testing.assert_array_equal(arrange_back(POOL(arrange(x), *how[1:])), how.by_hand(x))


@every_pooling
def test_pooling_in_onnxruntime(how: Pooling, by_library: bool) -> None:
    operator = Operator(how.model(), library=by_library, threads=2)
    for batch in (1, 16, 35):
        x = torch.randn(batch, 5, *how.size)
        np.testing.assert_allclose(operator(x=x), how.by_hand(x), rtol=1e-5, atol=1e-6)


@every_pooling
def test_gradients_of_pooling(how: Pooling) -> None:
    x = torch.randn(17, 3, *how.size)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain = pool(leaves[0], *how[1:])
    y = ARRANGE(POOL(ARRANGE(leaves[1]), *how[1:]), True)
    for one in (plain, y):
        (one * torch.linspace(-1, 1, one.numel()).reshape(one.shape)).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no window": ({"window": ()}, {"kernel_shape": ()}, "'kernel_shape' is missing"),
    "three axes": ({"window": (2, 2, 2)}, {"kernel_shape": (2, 2, 2)}, "'kernel_shape' has 3 entries, expected 1 or 2"),
    "an empty window": ({"window": (0, 2)}, {"kernel_shape": (0, 2)}, "'kernel_shape' holds 0"),
    "no step": ({"stride": (1, 0)}, {"strides": (1, 0)}, "'strides' holds 0"),
    "one step": ({"stride": (1,)}, {"strides": (1,)}, "'strides' has 1 entries, expected 2"),
    "less than nothing": ({"padding": (-1, 0)}, {"pads": (-1, 0, 0, 0)}, "'pads' holds -1"),
    "no dilation": ({"dilation": (0, 1)}, {"dilations": (0, 1)}, "'dilations' holds 0"),
    "much padding": ({"padding": (2, 1)}, {"pads": (1, 1, 2, 1)}, "'pads' is more than half of a window of 3"),
    "a wide window": (
        {"window": (30, 1), "padding": (0, 0)},
        {"kernel_shape": (30, 3)},
        "less than the dilated kernel's",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("library")
def test_poolings_that_are_refused(name: str) -> None:
    in_torch, in_onnx, words = REFUSED[name]
    how, x = POOLINGS["of a ResNet"], torch.randn(16, 3, 9, 11)
    with pytest.raises(FormatError, match="pool_samples"):
        POOL(x, *how._replace(**in_torch)[1:])
    with pytest.raises(Exception, match=f"MaxPoolSamples node 'pooling': .*{words}"):
        Operator(how.model(**in_onnx), library=True, threads=1)(x=x)


def test_means_have_no_dilation() -> None:
    with pytest.raises(FormatError, match="a mean has no dilation"):
        POOL(torch.randn(16, 3, 9, 11), *POOLINGS["mean"]._replace(dilation=(2, 1))[1:])
