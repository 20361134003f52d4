"""Condensed weights of awkward shapes, and comparisons of the torch operators with the NumPy oracle.

The oracle reads the inputs that kept weights name, and no others, as the kernels must.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srigl_fx.runtime import arranged, reference, value_types
from srigl_fx.runtime import ops as ops  # registers the operators
from srigl_fx.runtime.activations import NAMES
from srigl_fx.runtime.format import CondensedWeight, ValueDtype

DTYPES = value_types.NAMES
ACTIVATIONS = NAMES
EPSILON = 2.0**-24  # of rounding to float32

# For a row out of n: the columns it keeps, which leave room for k of them.
PATTERNS: dict[str, Callable[[int, int, int, int], tuple[int, int]]] = {
    "random": lambda row, n, in_features, k: (0, in_features),
    "run": lambda row, n, in_features, k: (row * 37 % (in_features - k + 1), k),
    "ends": lambda row, n, in_features, k: ((row % 2) * (in_features - k), k),
    "first": lambda row, n, in_features, k: (0, k),
    "last": lambda row, n, in_features, k: (in_features - k, k),
    "one astray": lambda row, n, in_features, k: (in_features - k, k) if row == n // 2 else (0, k),
    "uneven": lambda row, n, in_features, k: (0, in_features),  # and rows keep 1 to k of them
}


def condensed(
    n: int,
    in_features: int,
    k: int,
    *,
    n_active: int | None = None,
    active: Sequence[int] | None = None,
    dtype: ValueDtype = "float32",
    pattern: str = "random",
    seed: int = 0,
    groups: Sequence[int] = (1,),
) -> CondensedWeight:
    """A condensed weight with random values and bias, its kept columns as ``pattern`` says.

    Active rows share their columns in groups of as many neighbours as ``groups`` has in turn.
    """
    rng = np.random.default_rng(seed)
    some = rng.permutation(n)[: n if n_active is None else n_active]
    mask = np.zeros((n, in_features), np.bool_)
    for row in some if active is None else active:
        start, length = PATTERNS[pattern](int(row), n, in_features, k)
        columns = start + rng.choice(length, k, replace=False)
        mask[row, columns[: 1 + row % k] if pattern == "uneven" else columns] = True
    rows, first = np.flatnonzero(mask.any(axis=1)), 0
    for size in itertools.cycle(groups):
        if first >= len(rows):
            break
        mask[rows[first : first + size]] = mask[rows[first]]
        first += size
    bias = rng.standard_normal(n) + 2 * rng.choice((-1, 1), n)  # never near zero
    return CondensedWeight.from_dense(rng.standard_normal(mask.shape) * mask, mask, bias, dtype=dtype, pad=True)


def tensor(array: NDArray[Any]) -> Tensor:
    """The array as a torch tensor, bfloat16 included."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def operands(weight: CondensedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, indices, active, bias)."""
    return tensor(weight.values), tensor(weight.indices), tensor(weight.active), tensor(weight.bias)


def scales_of(weight: CondensedWeight) -> Tensor | None:
    """The scales of values of eight bits; None for other values."""
    return None if weight.scales is None else torch.from_numpy(weight.scales)


def _exact(weight: CondensedWeight) -> dict[str, Any]:
    """What the oracle reads: the values, and their scales if they have some."""
    return {"values": weight.values, "scales": weight.scales}


def _sizes(weight: CondensedWeight) -> dict[str, Any]:
    """What bounds the rounding errors: the absolute values."""
    return {"values": _absolute(weight.values) * (1 if weight.scales is None else weight.scales[:, None])}


def assert_close(y: Tensor, expected: NDArray[Any], size: NDArray[Any], k: int, what: str) -> None:
    """``y`` is the oracle's result up to rounding ``k`` products whose absolute values sum to ``size``."""
    assert y.dtype is torch.float32, what
    assert tuple(y.shape) == expected.shape, what
    got = y.detach().numpy()
    with np.errstate(all="ignore"):
        tolerance = EPSILON * (6 + k**0.5) * size + 4e-7 * np.minimum(1, np.abs(expected) + size)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected)) | (np.abs(got - expected) <= tolerance)
    if not same.all():
        where = tuple(int(i[0]) for i in np.nonzero(~same))
        raise AssertionError(f"{what}: {got[where]} at {where}, not {expected[where]}; {(~same).sum()} are wrong")


def check_linear(
    weight: CondensedWeight,
    x: Tensor,
    *,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    x_feature_major: bool = False,
    y_feature_major: bool = False,
) -> Tensor:
    """Compare ``condensed_linear`` with the oracle; return what it gave."""
    y: Tensor = torch.ops.srigl_fx.condensed_linear(
        x,
        *(tensors or operands(weight)),
        weight.in_features,
        residual=residual,
        activation=activation,
        x_feature_major=x_feature_major,
        y_feature_major=y_feature_major,
        scales=scales_of(weight),
    )
    compare_linear(y, weight, x, residual, activation)
    if y_feature_major:
        assert y.movedim(-1, 0).is_contiguous()
    return y


def compare_linear(y: Tensor, weight: CondensedWeight, x: Tensor, residual: Tensor | None, activation: str) -> None:
    """Compare the result of a linear layer with the oracle."""

    def oracle(convert: Callable[[NDArray[Any]], NDArray[Any]], kind: str, given: dict[str, Any]) -> NDArray[Any]:
        return reference.condensed_linear(
            convert(x.detach().numpy()),
            indices=weight.indices,
            active=weight.active,
            bias=convert(weight.bias),
            **given,
            residual=None if residual is None else convert(residual.detach().numpy()),
            activation=kind,
        )

    with np.errstate(all="ignore"):
        expected = oracle(lambda array: array, activation, _exact(weight))
        size = oracle(_absolute, "none", _sizes(weight))
    what = (
        f"{weight.values.dtype} {weight.out_features} x {weight.in_features}, k {weight.k}, {weight.n_active} active, "
        f"x {tuple(x.shape)} strides {x.stride()}, {activation}"
    )
    assert_close(y, expected, size, weight.k, what)


def _absolute(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.abs(array.astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """The geometry of a convolution over one to three axes."""

    n: int = 6
    channels: int = 4  # of the input
    kernel: tuple[int, ...] = (3, 3)
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    size: tuple[int, ...] = field(default=(9, 8))

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def weight_shape(self) -> list[int]:
        return [self.n, self.channels // self.groups, *self.kernel]

    @property
    def in_features(self) -> int:
        return int(np.prod(self.weight_shape[1:]))

    @property
    def steps(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stride, padding and dilation."""
        ones, zeros = (1,) * self.rank, (0,) * self.rank
        return self.stride or ones, self.padding or zeros, self.dilation or ones

    @property
    def output_size(self) -> tuple[int, ...]:
        """The sizes of the output's axes."""
        extra = self.output_padding or (0,) * self.rank
        reach = [d * (taps - 1) + 1 for taps, d in zip(self.kernel, self.steps[2], strict=True)]
        sizes = zip(self.size, *self.steps[:2], reach, extra, strict=True)
        if self.transposed:
            return tuple((size - 1) * s - 2 * p + r + more for size, s, p, r, more in sizes)
        return tuple((size + 2 * p - r) // s + 1 for size, s, p, r, _ in sizes)

    def condensed(self, k: int, **settings: Any) -> CondensedWeight:
        """A condensed weight of this geometry."""
        return condensed(self.n, self.in_features, k, **settings)

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.channels, *self.size)


SHAPES: dict[str, Convolution] = {
    "1d": Convolution(kernel=(5,), size=(23,)),
    "1d strided": Convolution(kernel=(4,), size=(37,), stride=(3,), padding=(2,), dilation=(2,)),
    "1d pointwise": Convolution(kernel=(1,), size=(16,)),
    "2d": Convolution(),
    "2d padded": Convolution(padding=(1, 1)),
    "2d strided": Convolution(stride=(2, 3), padding=(1, 2), size=(11, 14)),
    "2d dilated": Convolution(dilation=(2, 3), padding=(4, 5)),
    "2d strided, dilated": Convolution(stride=(3, 2), dilation=(2, 3), padding=(0, 4), size=(12, 15)),
    "2d groups": Convolution(groups=2, padding=(1, 0)),
    "2d depthwise": Convolution(n=8, channels=4, groups=4, padding=(1, 1)),
    "2d pointwise": Convolution(kernel=(1, 1), size=(7, 7)),
    "2d pointwise, 16 positions": Convolution(kernel=(1, 1), size=(4, 4)),
    "2d pointwise, strided": Convolution(kernel=(1, 1), stride=(2, 2), size=(7, 8)),
    "2d pointwise, padded": Convolution(kernel=(1, 1), padding=(1, 2), size=(5, 4)),
    "2d long kernel": Convolution(kernel=(1, 7), padding=(0, 3), size=(3, 20)),
    "2d one position": Convolution(size=(3, 3)),
    "2d one column": Convolution(kernel=(3, 1), size=(20, 1)),
    "2d one column, strided": Convolution(
        n=17, channels=2, kernel=(9, 1), stride=(4, 1), padding=(4, 0), size=(150, 1)
    ),
    "2d tall kernel": Convolution(n=18, kernel=(5, 1), padding=(2, 0), dilation=(2, 1), groups=1, size=(14, 5)),
    "2d tall kernel, strided": Convolution(n=17, kernel=(4, 1), stride=(3, 1), padding=(1, 0), size=(14, 5)),
    "1d far apart": Convolution(n=17, channels=1, kernel=(10,), stride=(5,), padding=(3,), size=(260,)),
    "3d long in depth": Convolution(n=17, kernel=(4, 1, 1), padding=(2, 0, 0), size=(7, 3, 2)),
    "3d one column": Convolution(n=17, kernel=(3, 2, 1), stride=(2, 3, 1), padding=(1, 1, 0), size=(7, 11, 1)),
    "3d": Convolution(kernel=(2, 3, 2), padding=(1, 1, 0), size=(4, 5, 6)),
    "3d strided": Convolution(kernel=(3, 2, 3), stride=(2, 1, 2), dilation=(1, 2, 1), groups=2, size=(5, 6, 7)),
    "1d transposed": Convolution(kernel=(4,), size=(13,), stride=(2,), padding=(1,), transposed=True),
    "2d transposed": Convolution(transposed=True),
    "2d transposed, strided": Convolution(
        kernel=(4, 3), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), size=(6, 5), transposed=True
    ),
    "2d transposed, dilated": Convolution(
        dilation=(2, 3), stride=(1, 2), output_padding=(0, 1), groups=2, size=(5, 4), transposed=True
    ),
    "2d transposed, more padding than kernel": Convolution(kernel=(2, 2), padding=(2, 1), transposed=True),
    "2d transposed pointwise": Convolution(kernel=(1, 1), stride=(2, 2), size=(5, 4), transposed=True),
    "2d transposed, one column": Convolution(
        n=17, kernel=(4, 1), stride=(3, 1), padding=(1, 0), size=(9, 1), transposed=True
    ),
    "2d transposed, tall kernel": Convolution(n=17, kernel=(3, 1), dilation=(2, 1), size=(6, 5), transposed=True),
    "3d transposed": Convolution(
        kernel=(2, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0), size=(3, 4, 3), groups=2, transposed=True
    ),
}


def check_conv(
    shape: Convolution,
    weight: CondensedWeight,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    is_arranged: bool = False,
) -> Tensor:
    """Compare ``condensed_conv`` with the oracle; return what it gave. Samples may be arranged on the way."""
    stride, padding, dilation = shape.steps
    before: Callable[[Tensor], Tensor] = arranged.arrange if is_arranged else lambda given: given
    y: Tensor = torch.ops.srigl_fx.condensed_conv(
        before(x),
        *operands(weight),
        shape.weight_shape,
        stride,
        padding,
        dilation,
        shape.groups,
        residual=None if residual is None else before(residual),
        activation=activation,
        transposed=shape.transposed,
        output_padding=shape.output_padding,
        scales=scales_of(weight),
        arranged=is_arranged,
    )
    y = arranged.arrange_back(y) if is_arranged else y
    compare_conv(y, shape, weight, x, residual, activation)
    return y


def compare_conv(
    y: Tensor, shape: Convolution, weight: CondensedWeight, x: Tensor, residual: Tensor | None, activation: str
) -> None:
    """Compare the result of a convolution with the oracle."""
    stride, padding, dilation = shape.steps

    def oracle(convert: Callable[[NDArray[Any]], NDArray[Any]], kind: str, given: dict[str, Any]) -> NDArray[Any]:
        return reference.condensed_conv(
            convert(x.detach().numpy()),
            indices=weight.indices,
            active=weight.active,
            bias=convert(weight.bias),
            **given,
            weight_shape=shape.weight_shape,
            strides=stride,
            pads=padding * 2,
            dilations=dilation,
            group=shape.groups,
            transposed=shape.transposed,
            output_padding=shape.output_padding or None,
            residual=None if residual is None else convert(residual.detach().numpy()),
            activation=kind,
        )

    with np.errstate(all="ignore"):
        expected = oracle(lambda array: array, activation, _exact(weight))
        size = oracle(_absolute, "none", _sizes(weight))
    what = f"{shape}, {weight.values.dtype}, k {weight.k}, {weight.n_active} active, x {tuple(x.shape)}, {activation}"
    assert_close(y, expected, size, weight.k, what)


def bits(y: Tensor) -> bytes:
    """The exact content of a result."""
    return y.contiguous().numpy().tobytes()


def misaligned(values: Tensor, elements: int = 1) -> Tensor:
    """The same values in memory that starts ``elements`` later than an allocation, so unaligned for vectors."""
    room = values.new_empty(values.numel() + elements)
    room[elements:] = values.reshape(-1)
    return room[elements:].view(values.shape)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """``x`` (batch, features), equal in every layout that a caller may hand over."""
    batch, features = x.shape
    every_third = x.new_zeros(batch, 3 * features + 1)[:, 1::3]
    every_third.copy_(x)
    in_a_wider_one = x.new_zeros(batch, features + 5)[:, 2 : features + 2]
    in_a_wider_one.copy_(x)
    feature_major_with_gaps = x.new_zeros(features, batch + 3).t()[:batch]
    feature_major_with_gaps.copy_(x)
    return {
        "misaligned": misaligned(x),
        "odd stride": every_third,
        "rows with gaps": in_a_wider_one,
        "feature-major": x.t().contiguous().t(),
        "feature-major, misaligned": misaligned(x.t().contiguous(), 3).t(),
        "feature-major with gaps": feature_major_with_gaps,
        "expanded": x[:1].expand(batch, features),
        "one number": x[:1, :1].expand(batch, features),
    }


def axes(total: int, *borders: int) -> Sequence[int]:
    """0 to ``total``, and then the numbers around each border."""
    return [*range(total + 1), *(border + step for border in borders for step in (-1, 0, 1))]
