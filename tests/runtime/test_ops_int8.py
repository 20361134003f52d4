"""The torch operators with values of eight bits: strict about their operands, no gradients, no stale weights."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import Convolution, bits, check_conv, check_linear, condensed, operands, scales_of
from kernel_support.whole_numbers import run_conv, run_linear
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime import validation
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN

linear = torch.ops.srigl_fx.condensed_linear
conv = torch.ops.srigl_fx.condensed_conv
IMAGE = Convolution(padding=(1, 1), groups=2)
GEOMETRY = IMAGE.weight_shape, *IMAGE.steps, IMAGE.groups
batches = pytest.mark.parametrize("batch", [1, 5, 40])


def test_hand_computed() -> None:
    """[1.5, -3] is [63.5, -127] steps of 3 / 127, and 63.5 goes to 64."""
    values, indices = (
        torch.tensor([[127, -64], [2, 1]], dtype=torch.int8),
        torch.tensor([[0, 1], [0, 1]]).to(torch.uint16),
    )
    active, bias, scales = (
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([1.0, 5.0, -1.0]),
        torch.tensor([0.5, 2]),
    )
    y = linear(torch.tensor([[1.5, -3.0]]), values, indices, active, bias, 2, scales=scales)
    step = 3 / 127
    expected = [1 + (127 * 64 + 64 * 127) * step * 0.5, 5.0, -1 + (2 * 64 - 127) * step * 2]
    torch.testing.assert_close(y, torch.tensor([expected]), rtol=1e-6, atol=0)


def _refused(message: str, **changes: Any) -> None:
    weight = condensed(5, 9, 4, n_active=4, dtype="int8")
    parts = dict(zip(("values", "indices", "active", "bias"), operands(weight), strict=True))
    given = {"x": torch.randn(2, 9), **parts, "in_features": 9, "scales": scales_of(weight)}
    linear(**given)
    with pytest.raises(FormatError, match=message):
        linear(**given | changes)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, r"values of int8, and no others, have scales; got torch\.int8 and scales None"),
        (torch.ones(4).double(), r"scales must be float32 \(4,\), one for each active row, not torch\.float64"),
        (torch.ones(4).half(), r"scales must be float32"),
        (torch.ones(5), r"scales must be float32 \(4,\), one for each active row, not torch\.float32 \(5,\)"),
        (torch.ones(4, 1), r"not torch\.float32 \(4, 1\)"),
        (torch.tensor(1.0), r"not torch\.float32 \(\)"),
    ],
)
def test_scales_that_are_refused(scales: Tensor | None, message: str) -> None:
    _refused(message, scales=scales)


def test_dtypes_that_are_refused() -> None:
    _refused("values of int8, and no others, have scales; got torch.float32", values=torch.randn(4, 4))
    _refused("values must be float32, bfloat16, float16 or int8", values=torch.ones(4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x_scale": 0.0}, r"x_scale must be a finite number of at least 2\*\*-100, not 0\.0"),
        ({"x_scale": -1.0}, "not -1.0"),
        ({"x_scale": float("inf")}, "not inf"),
        ({"x_scale": float("nan")}, "not nan"),
        ({"x_scale": 1e-31}, "not 1e-31"),
        ({"x_scale": 1e39}, r"not 1e\+39"),
        ({"x_scale": 1.0, "x_offset": 1}, "x_offset must be 0 or 128, not 1"),
        ({"y_scale": 0.0}, r"y_scale must be a finite number of at least 2\*\*-100, not 0\.0"),
        ({"y_scale": float("nan")}, "y_scale .* not nan"),
        ({"y_scale": 1e39}, r"y_scale .* not 1e\+39"),
        ({"y_scale": 1.0, "y_offset": 127}, "y_offset must be 0 or 128, not 127"),
    ],
)
def test_given_scales_that_are_refused(given: dict[str, Any], message: str) -> None:
    _refused(message, **given)
    filters = IMAGE.condensed(4, dtype="int8")
    with pytest.raises(FormatError, match=message):
        run_conv(IMAGE, filters, torch.randn(2, 4, 9, 8), **given)


def test_a_given_scale_is_for_values_of_eight_bits() -> None:
    weight = condensed(5, 9, 4)
    with pytest.raises(
        FormatError, match="only samples of a weight of int8 are rounded; got an x_scale without scales"
    ):
        linear(torch.randn(2, 9), *operands(weight), 9, x_scale=0.5)
    with pytest.raises(FormatError, match="only outputs of a weight of int8 are rounded; got a y_scale without scales"):
        linear(torch.randn(2, 9), *operands(weight), 9, y_scale=0.5)


def test_bytes_that_are_refused() -> None:
    weight, x = condensed(5, 9, 4, dtype="int8"), torch.zeros(2, 9, dtype=torch.uint8)
    with pytest.raises(FormatError, match="x is uint8, rounded with a scale that is not given; pass it as x_scale"):
        run_linear(weight, x)
    with pytest.raises(FormatError, match=r"x must be float32, not torch\.int8"):
        run_linear(weight, x.to(torch.int8), x_scale=0.5)
    with pytest.raises(FormatError, match=r"round_samples: x must be float32, not torch\.uint8"):
        torch.ops.srigl_fx.round_samples(x, 0.5, 0)
    with pytest.raises(FormatError, match="round_samples: scale must be a finite number"):
        torch.ops.srigl_fx.round_samples(torch.ones(2), 0.0, 0)
    with pytest.raises(FormatError, match="round_samples: offset must be 0 or 128, not 5"):
        torch.ops.srigl_fx.round_samples(torch.ones(2), 1.0, 5)


def test_sums_that_int32_does_not_hold_are_refused() -> None:
    k = LARGEST_FAN_IN + 1
    values, indices = torch.ones(1, k, dtype=torch.int8), torch.arange(k, dtype=torch.int32)[None]
    active, bias = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with pytest.raises(FormatError, match=rf"a fan-in of {k} is too large for sums of int32 \(largest: {k - 1}\)"):
        linear(torch.ones(1, k), values, indices, active, bias, k, scales=torch.ones(1))


def test_gradients_are_refused_in_words() -> None:
    """The forward pass runs, for a model that has other parameters to train behind this layer."""
    weight, shape = condensed(5, 9, 4, dtype="int8"), IMAGE
    filters = shape.condensed(4, dtype="int8")
    for y in (
        run_linear(weight, torch.randn(2, 9, requires_grad=True)),
        run_linear(weight, torch.randn(2, 9, requires_grad=True), x_scale=0.02, x_offset=128),
        run_conv(shape, filters, torch.randn(2, 4, 9, 8, requires_grad=True)),
        linear(
            torch.randn(2, 9), *operands(weight)[:3], torch.zeros(5, requires_grad=True), 9, scales=scales_of(weight)
        ),
    ):
        with pytest.raises(FormatError, match=r"values of eight bits.*have no gradient.*value_dtype=torch\.float32"):
            y.sum().backward()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, as it compares
def test_opcheck() -> None:
    """All but the gradients, which are refused."""
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    weight, filters = condensed(6, 18, 5, n_active=5, dtype="int8"), IMAGE.condensed(5, dtype="int8")
    for op, given, one in (
        (linear.default, (torch.randn(3, 18), *operands(weight), 18), weight),
        (conv.default, (torch.randn(2, 4, 9, 8), *operands(filters), *GEOMETRY), filters),
    ):
        for more in ({}, {"x_scale": 0.02, "x_offset": 128}, {"y_scale": 0.02, "y_offset": 128}):
            torch.library.opcheck(op, given, {"scales": scales_of(one), **more}, test_utils=utilities)
    rounding = torch.ops.srigl_fx.round_samples.default
    torch.library.opcheck(rounding, (torch.randn(3, 18), 0.02, 128), test_utils=utilities)


def test_meta_tensors() -> None:
    weight = condensed(6, 18, 5, dtype="int8")
    parts = [part.to("meta") for part in operands(weight)]
    y = linear(torch.empty(3, 18, device="meta"), *parts, 18, scales=torch.empty(6, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((3, 6), torch.float32, "meta")
    scales = torch.empty(6, device="meta")
    y = linear(torch.empty(3, 18, device="meta"), *parts, 18, y_feature_major=True, scales=scales, y_scale=0.5)
    assert (y.shape, y.dtype, y.stride()) == ((3, 6), torch.uint8, (1, 3))


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, weight in {"conv": IMAGE.condensed(5, dtype="int8"), "fc": condensed(5, 6, 3, dtype="int8")}.items():
            for part, tensor in zip("0123s", (*operands(weight), scales_of(weight)), strict=True):
                self.register_buffer(f"{name}{part}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        filters, fc = ([self.get_buffer(f"{name}{i}") for i in range(4)] for name in ("conv", "fc"))
        y: Tensor = conv(x, *filters, *GEOMETRY, activation="relu", scales=self.get_buffer("convs"), y_scale=0.02)
        out: Tensor = linear(y.permute(0, 2, 3, 1), *fc, 6, scales=self.get_buffer("fcs"), x_scale=0.02)
        return out


@pytest.mark.long
def test_export_and_compile() -> None:
    net = _Net()
    program = torch.export.export(
        net, (torch.randn(2, 4, 9, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 9, 8)
        assert torch.equal(program.module()(x), net(x))
        assert torch.equal(compiled(x), net(x))


@batches
def test_weights_that_change_in_place_are_seen(batch: int) -> None:
    weight = condensed(21, 70, 9, n_active=20, dtype="int8")
    tensors, scales = operands(weight), scales_of(weight)  # which share the arrays' memory
    assert scales is not None
    x = torch.randn(batch, 70)

    def run() -> Tensor:
        y: Tensor = linear(x, *tensors, 70, scales=scales)
        assert bits(y) == bits(run_linear(dataclasses.replace(weight, **_copies(weight)), x))
        return y

    first = run()
    scales.mul_(2)
    second = run()
    assert not torch.allclose(first, second)
    tensors[0].mul_(-1)
    assert not torch.allclose(second, run())
    tensors[3].add_(1)
    run()


def _copies(weight: Any) -> dict[str, Any]:
    return {name: getattr(weight, name).copy() for name in ("values", "indices", "active", "bias", "scales")}


@batches
@pytest.mark.parametrize("part", ["values", "scales"])
def test_parts_that_follow_each_other_in_the_same_memory(part: str, batch: int) -> None:
    """As where they are made anew for each call: the allocator gives them the memory of those before."""
    weight = condensed(37, 300, 40, n_active=35, dtype="int8")
    given: dict[str, Any] = dict(zip(("values", "indices", "active", "bias"), operands(weight), strict=True))
    given |= {"scales": scales_of(weight), "in_features": 300, "x": torch.randn(batch, 300)}
    memory = getattr(weight, part).copy()
    for factor in (1, -1, 2) if part == "scales" else (1, -1):
        memory[:] = factor * getattr(weight, part)
        fresh = torch.from_numpy(memory)
        y = linear(**given | {part: fresh})
        del fresh
        expected = run_linear(dataclasses.replace(weight, **{part: memory.copy()}), given["x"])
        assert bits(y) == bits(expected), factor


@batches
def test_inference_tensors(batch: int) -> None:
    """Of a weight whose parts torch does not count the writes to, nothing is kept."""
    weight = condensed(37, 300, 40, n_active=35, dtype="int8")
    x, parts = torch.randn(batch, 300), [*operands(weight), torch.from_numpy(weight.scales)]
    expected = run_linear(weight, x)
    with torch.inference_mode():
        made_here = [part.clone() for part in parts]
        for which in (range(5), [4], [0]):
            mixed = [made_here[i] if i in which else part for i, part in enumerate(parts)]
            assert bits(linear(x, *mixed[:4], 300, scales=mixed[4])) == bits(expected)
            made_here[4].mul_(2)
            mixed = [made_here[i] if i in which else part for i, part in enumerate(parts)]
            doubled = linear(x, *mixed[:4], 300, scales=mixed[4]) - mixed[3]
            torch.testing.assert_close(doubled, (2 if 4 in which else 1) * (expected - mixed[3]))
            made_here[4].mul_(0.5)


def test_the_check_keeps_nothing_alive() -> None:
    before = len(validation._checked)
    weight = condensed(37, 300, 40, n_active=35, dtype="int8")
    parts = [part.clone() for part in (*operands(weight), torch.from_numpy(weight.scales))]
    linear(torch.ones(1, 300), *parts[:4], 300, scales=parts[4])
    assert len(validation._checked) == before + 1
    del parts
    assert len(validation._checked) == before


@batches
def test_operands_with_gaps(batch: int) -> None:
    weight = condensed(21, 70, 9, n_active=20, dtype="int8")
    x = torch.randn(batch, 70)
    parts = [*operands(weight), torch.from_numpy(weight.scales)]
    gaps = [torch.stack((part, part), -1)[..., 1] for part in parts]
    assert not any(part.is_contiguous() for part in gaps)
    assert bits(linear(x, *gaps[:4], 70, scales=gaps[4])) == bits(run_linear(weight, x))


def test_no_active_rows() -> None:
    weight = condensed(5, 9, 4, n_active=0, dtype="int8")
    for batch in (1, 40):
        assert torch.equal(check_linear(weight, torch.randn(batch, 9)), torch.from_numpy(weight.bias).expand(batch, 5))
    check_conv(IMAGE, IMAGE.condensed(3, n_active=0, dtype="int8"), IMAGE.input(2))


def test_how_far_it_is_from_the_float_layer() -> None:
    """About forty decibels for numbers as they are in networks: what docs/quantised.md says."""
    rng = np.random.default_rng(0)
    ratios = []
    for in_features, k in ((768, 77), (3072, 307), (256, 200)):
        exact = condensed(300, in_features, k)
        rounded = condensed(300, in_features, k, dtype="int8")
        x = torch.from_numpy(rng.standard_normal((64, in_features)).astype(np.float32))
        for given in (x, x.relu()):
            y, noisy = (run_linear(one, given) - torch.from_numpy(one.bias) for one in (exact, rounded))
            ratios.append(10 * float((y.square().sum() / (y - noisy).square().sum()).log10()))
    assert min(ratios) > 35
    assert max(ratios) < 50
