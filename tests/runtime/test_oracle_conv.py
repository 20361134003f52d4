"""``condensed_conv`` against the oracle: one to three axes, transposed or not, every dtype, awkward sizes.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    ACTIVATIONS,
    DTYPES,
    PATTERNS,
    SHAPES,
    Convolution,
    axes,
    check_conv,
    condensed,
    misaligned,
    tensor,
)

from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import ValueDtype

dtypes = pytest.mark.parametrize("dtype", DTYPES)

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dtypes
@every_shape
def test_shapes(shape: Convolution, dtype: ValueDtype) -> None:
    for k, n_active in ((1, 1), (3, shape.n - 1), (shape.in_features, shape.n)):
        weight = shape.condensed(min(k, shape.in_features), n_active=n_active, dtype=dtype)
        for batch in (0, 1, 2, 3):
            check_conv(shape, weight, shape.input(batch))


@every_shape
def test_ablated(shape: Convolution) -> None:
    weight = shape.condensed(2, n_active=0)
    y = check_conv(shape, weight, shape.input(2))
    assert torch.equal(y, tensor(weight.bias).reshape(-1, *[1] * shape.rank).expand_as(y))


@every_shape
def test_epilogues(shape: Convolution) -> None:
    for dtype, activation in zip(DTYPES * 3, ACTIVATIONS, strict=False):
        weight = shape.condensed(3, n_active=shape.n - 1, dtype=dtype)
        for batch in (1, 2):
            x = shape.input(batch)
            y = check_conv(shape, weight, x, activation=activation)
            residual = 3 * torch.randn(y.shape)
            flipped = residual.transpose(1, -1).contiguous().transpose(1, -1)
            for added in (residual, flipped, misaligned(residual), residual[:1, :1].expand_as(y)):
                check_conv(shape, weight, x, residual=added, activation=activation)


@every_shape
def test_layouts(shape: Convolution) -> None:
    weight = shape.condensed(3, n_active=shape.n - 1)
    x = shape.input(3)
    for same in (
        misaligned(x),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.movedim(1, -1).contiguous().movedim(-1, 1),
        x.repeat_interleave(3, -1)[..., ::3],
        x[:1].expand_as(x),
        x[:, :1].expand_as(x),
    ):
        before = same.clone()
        check_conv(shape, weight, same)
        assert torch.equal(same, before)


@dtypes
@pytest.mark.parametrize("kernel", [1, 3])
def test_widths(kernel: int, dtype: ValueDtype) -> None:
    """Rows and planes that end before, at and after a vector and a tile."""
    for width in axes(3, 16, 32, 64, 256, 512):
        if width:
            shape = Convolution(n=17, channels=3, kernel=(1, kernel), padding=(0, kernel // 2), size=(2, width))
            check_conv(shape, shape.condensed(2, n_active=16, dtype=dtype), shape.input(2))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_batches(kernel: tuple[int, int]) -> None:
    shape = Convolution(kernel=kernel, size=(4, 5))
    if kernel == (3, 3):
        shape = Convolution(kernel=kernel, size=(4, 5), padding=(1, 1), stride=(2, 1))
    weight = shape.condensed(3, n_active=5)
    for batch in (4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 67):
        check_conv(shape, weight, shape.input(batch))


@pytest.mark.parametrize("n", [4, 20])
def test_more_samples_than_are_packed_at_a_time(n: int) -> None:
    shape = Convolution(n=n, channels=16, size=(18, 18), padding=(1, 1), stride=(2, 2))
    check_conv(shape, shape.condensed(4, n_active=n - 1), shape.input(67))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "active",
    [range(80), range(35, 80), range(37), range(0, 80, 2), [79], [0], []],
    ids=["all", "last", "first", "every other", "very last", "very first", "none"],
)
def test_threads_share_the_work(active: Sequence[int], transposed: bool, kernel: tuple[int, int], threads: int) -> None:
    """Whichever filters are ablated at the borders of the threads' shares."""
    with torch_threads(threads):
        for groups in (1, 4):
            shape = Convolution(n=80, channels=40, kernel=kernel, groups=groups, size=(10, 13), transposed=transposed)
            weight = shape.condensed(9, active=active)
            for batch in (1, 5):
                y = check_conv(shape, weight, shape.input(batch))
                check_conv(shape, weight, shape.input(batch), residual=torch.randn(y.shape), activation="relu")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("active", [range(48), range(40), range(3, 48), [*range(20), *range(30, 47)]])
def test_planes_of_whole_tiles(active: Sequence[int], activation: str, kernel: int) -> None:
    """Outputs that are computed in their place, in several passes over the inputs, beside rows that are not."""
    channels = 250 if kernel == 1 else 30
    shape = Convolution(n=48, channels=channels, kernel=(kernel,) * 2, padding=(kernel // 2,) * 2, size=(7, 16))
    weight, x = shape.condensed(60, active=active), shape.input(2)
    x[0, 7, 2, 5], x[1, 3, 3, 3] = torch.nan, torch.inf
    y = check_conv(shape, weight, x, activation=activation)
    check_conv(shape, weight, x, residual=torch.randn(y.shape), activation=activation)


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (15, 1), (16, 1), (17, 1), (33, 3), (40, 2), (64, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_filters(n: int, groups: int, transposed: bool) -> None:
    shape = Convolution(n=n, channels=3 * groups, groups=groups, padding=(1, 1), size=(6, 5), transposed=transposed)
    for n_active in {1, n // 2, n}:
        check_conv(shape, shape.condensed(5, n_active=n_active), shape.input(2))


@dtypes
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_adversarial_masks(pattern: str, transposed: bool, dtype: ValueDtype) -> None:
    shape = Convolution(n=18, channels=40, padding=(1, 1), size=(6, 7), transposed=transposed)
    for k in (1, 9, 20):
        check_conv(shape, shape.condensed(k, n_active=17, dtype=dtype, pattern=pattern), shape.input(2))


def test_more_taps_than_uint16_counts() -> None:
    shape = Convolution(n=17, channels=7300, padding=(1, 1), size=(3, 4))
    weight = shape.condensed(20, pattern="ends")
    assert weight.indices.dtype.name == "int32"
    check_conv(shape, weight, shape.input(2))


@st.composite
def _cases(draw: st.DrawFn) -> Convolution:
    rank = draw(st.integers(1, 3))
    largest = (40, 12, 6)[rank - 1]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    groups, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    reach = [d * (taps - 1) + 1 for taps, d in zip(kernel, dilation, strict=True)]
    extra = each(0, 2) if transposed else ()
    more = each(0, largest)
    size: list[int] = []
    for axis in range(rank):
        if transposed:  # (size - 1) * stride - 2 * padding + reach >= 1
            needed = 2 * padding[axis] + 1 - reach[axis]
            size.append(max(1, -(-needed // stride[axis]) + 1) + more[axis])
        else:
            size.append(max(1, reach[axis] - 2 * padding[axis]) + more[axis])
    return Convolution(
        n=groups * draw(st.integers(1, 7)),
        channels=groups * draw(st.integers(1, 4)),
        kernel=kernel,
        groups=groups,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        # torch wants less than the stride or the dilation.
        output_padding=tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=transposed)),
        size=tuple(size),
    )


@pytest.mark.long
@given(
    shape=_cases(),
    density=st.floats(0, 1),
    ablated=st.integers(0, 3),
    batch=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    with_residual=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_anything(
    shape: Convolution,
    density: float,
    ablated: int,
    batch: int,
    dtype: ValueDtype,
    activation: str,
    with_residual: bool,
) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"n_active": max(0, shape.n - ablated), "dtype": dtype}
    weight = condensed(shape.n, shape.in_features, max(1, round(density * shape.in_features)), **settings)
    x = shape.input(batch)
    y = check_conv(shape, weight, x, activation=activation)
    if with_residual:
        check_conv(shape, weight, x, residual=torch.randn(y.shape), activation=activation)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("density", [0.05, 0.2])
@pytest.mark.parametrize(
    "shape",
    [
        Convolution(n=64, channels=64, padding=(1, 1), size=(28, 28)),
        Convolution(n=128, channels=64, stride=(2, 2), padding=(1, 1), size=(28, 28)),
        Convolution(n=256, channels=64, kernel=(1, 1), size=(14, 14)),
        Convolution(n=32, channels=3, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(64, 64)),
        Convolution(n=32, channels=64, kernel=(4, 4), stride=(2, 2), padding=(1, 1), size=(14, 14), transposed=True),
        Convolution(n=64, channels=64, kernel=(3, 3, 3), padding=(1, 1, 1), size=(5, 14, 14)),
    ],
    ids=str,
)
def test_layers_of_real_models(shape: Convolution, density: float, dtype: ValueDtype) -> None:
    weight = shape.condensed(max(1, round(density * shape.in_features)), n_active=shape.n - 3, dtype=dtype)
    check_conv(shape, weight, shape.input(2), activation="relu")
