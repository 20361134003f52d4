"""What a running model multiplies its weights with, whichever module or function does it.

Owns how the inputs of a weight are found among the operators that PyTorch dispatches, and how they become rows of its
matrix view. It must not know what they are wanted for.

Rules:
    1. A weight is known by its memory: the operand of a matrix product that views it, whole or some of its rows, or
       the weight of a convolution, whole.
    2. The rows of a product are its other operand; those of a convolution are its windows, one section of rows for each
       of its groups.
    3. A weight that is copied first (a cast, autocast, a scale) is not seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from srigl_fx.masks.records import WeightSite
from srigl_fx.passes.sites.contractions import name_of

_WINDOWS = 1 << 24  # numbers in the windows of a convolution that are made at a time: 64 MiB


@dataclass(frozen=True)
class SeenInput:
    """One use of a weight.

    Attributes:
        weight: Its name.
        start: The first row of its matrix view that reads the input.
        stop: The first one behind them.
        source: The operand that the rows are made of.
        parts: Makes the rows: some (N, F) at a time, in order.
        version: How often the operand had been changed in place.
        how: What the rows depend on besides ``source``: of a convolution kernel, stride, padding, dilation and groups;
            nothing of a product.
    """

    weight: str
    start: int
    stop: int
    source: Tensor
    parts: Callable[[], Iterator[Tensor]]
    version: int
    how: tuple[tuple[int, ...], ...] = ()


def is_visible(site: WeightSite) -> bool:
    """Whether inputs of a weight that is laid out so can be seen.

    Example:
        >>> is_visible(WeightSite(owner="", attr="weight", kind="linear", shape=(3, 2)))
        True
        >>> is_visible(WeightSite(owner="", attr="weight_hh", kind="rnn_gates", shape=(8, 2)))
        False
    """
    matrices = site.kind in ("linear", "linear_in_out", "attention_in") and len(site.view) == 2
    return matrices or site.kind in ("conv1d", "conv2d", "conv3d")


class WeightInputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows each use of some weights as it comes by.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> site = WeightSite(owner="", attr="weight", kind="linear", shape=(2, 3))
        >>> with torch.no_grad(), WeightInputs({site: layer.weight}, lambda use: print(next(use.parts()).tolist())):
        ...     _ = layer(torch.ones(1, 3))
        [[1.0, 1.0, 1.0]]
    """

    def __init__(self, weights: Mapping[WeightSite, nn.Parameter], seen: Callable[[SeenInput], None]) -> None:
        """See the class.

        Args:
            weights: The parameters by their sites; :func:`is_visible` holds for each.
            seen: Called with each use before it is computed; the model goes on when it returns.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        self._by_memory: dict[int, list[tuple[WeightSite, nn.Parameter]]] = {}
        for site, parameter in weights.items():
            self._by_memory.setdefault(_memory(parameter), []).append((site, parameter))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Show the weight that an operator reads, then call it."""
        name = name_of(func)
        for found in self._in_product(name, args) if name in _PRODUCTS else self._in_convolution(name, args):
            self._seen(found)
        return func(*args, **(kwargs or {}))

    def _in_product(self, name: str, args: Sequence[Any]) -> Iterator[SeenInput]:
        left, right = args[_PRODUCTS[name] :][:2]
        versions = _version(left), _version(right)
        if name in ("mv", "addmv"):
            right = right.unsqueeze(1)
        # x @ W, with W as (F, n).
        for data, matrix, version in zip((left, right.mT), (right, left.mT), versions, strict=True):
            for site, parameter in self._by_memory.get(_memory(matrix), ()):
                rows = _rows(site, parameter, matrix)
                if rows is not None:

                    def whole(data: Tensor = data) -> Iterator[Tensor]:
                        yield data.reshape(-1, data.shape[-1])

                    yield SeenInput(site.fqn, *rows, data, whole, version)

    def _in_convolution(self, name: str, args: Sequence[Any]) -> Iterator[SeenInput]:
        if name != "convolution" or args[6]:  # transposed
            return
        x, weight, _, stride, padding, dilation, _, _, groups = args
        for site, parameter in self._by_memory.get(_memory(weight), ()):
            if weight.shape != parameter.shape or weight.storage_offset() != parameter.storage_offset():
                continue
            section = weight.shape[0] // groups
            how = (*map(tuple, (weight.shape[2:], stride, padding, dilation)), (groups,))
            for group, part in enumerate(x.chunk(groups, dim=1)):

                def parts(part: Tensor = part) -> Iterator[Tensor]:
                    return windows(part, weight.shape[2:], stride, padding, dilation)

                yield SeenInput(site.fqn, group * section, (group + 1) * section, part, parts, _version(x), how)


# Where the first factor of a product stands among its arguments.
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _version(operand: Tensor) -> int:
    """How often an operand was changed in place; views that are made below the dispatcher do not know."""
    # A tensor of inference mode counts no changes: outside of it, it refuses them.
    return 0 if operand.is_inference() else int(operand._version)


def _rows(site: WeightSite, parameter: nn.Parameter, matrix: Tensor) -> tuple[int, int] | None:
    """The rows of the weight's matrix view that a factor (F, n), or a batch of one, is; None where it is none."""
    if matrix.dim() == 3:
        if matrix.stride(0) and matrix.shape[0] > 1:
            return None
        matrix = matrix[0]
    if site.kind.startswith("conv"):
        return None
    row, column = (parameter.stride(axes[0]) for axes in (site.neuron_axes, site.input_axes))
    inputs, rows = matrix.shape
    start, odd = divmod(int(matrix.storage_offset()) - int(parameter.storage_offset()), row)
    strides = (inputs == 1 or matrix.stride(0) == column) and (rows == 1 or matrix.stride(1) == row)
    whole = inputs == site.matrix_shape[1] and not odd and 0 <= start <= start + rows <= site.matrix_shape[0]
    return (start, start + rows) if strides and whole else None


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """The windows of a convolution as rows (N, channels * kernel), in the order of samples and places, some at a time.

    Args:
        x: (samples, channels, ...).
        kernel: Its sizes, one for each axis behind the channels; and so the others.
        stride: How far windows are apart.
        padding: Zeros at both ends of each axis.
        dilation: How far numbers of a window are apart.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> [rows.tolist() for rows in windows(x, (2,), (2,), (1,), (1,))]
        [[[0.0, 0.0], [1.0, 2.0], [3.0, 0.0]]]
    """
    ends = [end for size in reversed(padding) for end in (size, size)]
    axes = len(kernel)
    each = x[:1].numel() * max(1, torch.Size(kernel).numel())
    for samples in torch.split(x, max(1, _WINDOWS // max(1, each))):
        found = functional.pad(samples, ends)
        for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
            found = found.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        # Samples, channels, places, then the numbers of a window: channels go behind the places.
        order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
        yield found.permute(order).reshape(-1, x.shape[1] * torch.Size(kernel).numel())
