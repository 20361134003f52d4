"""How far the results of two models may lie apart, and how far they do.

Owns the two measures, and the one loop over sizes and calls, that lowering, its regions, the check between passes
and export verify with. It must not know what is compared: its callers run the two models and word the error.

The measure is the relative error, of the largest value. Where activations are rounded to eight bits, every one of them
is off by up to half a step, and it is the signal-to-noise ratio: of all values together, in dB,
``10 log10(sum of squares of what is expected / sum of squares of the differences)``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Where = TypeVar("Where")

TOLERANCE = 1e-4  # of the largest output, for float32
# In dB, of a layer that is rounded to eight bits, and of the outputs of a model with such layers. Gaussian noise was
# added to what every sparse layer of trained networks gives (CNN, vision transformer and character GPT of
# examples/claims at 90 %), which gave the outputs about as much. Losses rise by at most 0.003 bits at 30 dB, 0.013 at
# 25 dB, 0.04 at 20 dB and 0.13 at 15 dB. Rounded to eight bits, the layers of these networks have 42 dB and more.
LEAST_LAYER_SNR = 25.0
LEAST_OUTPUT_SNR = 20.0


@dataclass(frozen=True)
class Limit:
    """How far results may lie apart.

    Attributes:
        error: The largest relative error that is not wrong.
        snr: The smallest signal-to-noise ratio in dB, which counts in place of the error; None where the error does.

    Example:
        >>> str(Limit()), str(Limit(snr=20.0))
        ('allowed: 1.00e-04', 'at least 20 dB are asked for')
    """

    error: float = TOLERANCE
    snr: float | None = None

    def allows(self, error: float, snr: float) -> bool:
        """Whether a result is close enough."""
        return error <= self.error if self.snr is None else snr >= self.snr

    def __str__(self) -> str:
        return f"allowed: {self.error:.2e}" if self.snr is None else f"at least {self.snr:g} dB are asked for"


def limit(value_dtypes: Iterable[torch.dtype]) -> Limit:
    """How far off the outputs of a model may be whose condensed layers' values have these dtypes.

    In float32 and 16 bits, see :func:`tolerance`; where any layer is rounded to eight bits, the signal-to-noise ratio
    of each output counts.

    Example:
        >>> limit([torch.float32]).error, limit([torch.bfloat16] * 16).error, limit([torch.float32, torch.int8]).snr
        (0.0001, 0.03125, 20.0)
    """
    counts = Counter(value_dtypes)
    rounded = counts.pop(torch.int8, 0)
    error = math.hypot(*(tolerance(dtype, layers) for dtype, layers in counts.items() if dtype is not torch.float32))
    return Limit(max(TOLERANCE, error), LEAST_OUTPUT_SNR if rounded else None)


@dataclass(frozen=True)
class Results:
    """What one call of a model gave.

    Attributes:
        outputs: The leaves of what it returned.
        buffers: The buffers that it wrote, by name, as they were afterwards.
    """

    outputs: Sequence[Any]
    buffers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One result in which two models differ.

    Attributes:
        what: Which one: "output 0", "the buffer total", or "the number of outputs".
        error: The relative error; infinite where there is no other number for it.
        snr: The signal-to-noise ratio; minus infinity where there is no other number for it.
        at: The sizes at which it was found, None where there were those of the inputs only.
        call: Which of several calls in a row, from 0.
        counts: The number of outputs expected, and that which came.
    """

    what: str
    error: float
    snr: float
    at: object
    call: int
    counts: tuple[int, int]

    @property
    def place(self) -> str:
        """Where it was found, for an error message: " at batch 3 in call 2", or less."""
        return (f" at {self.at}" if self.at is not None else "") + (f" in call {self.call + 1}" if self.call else "")

    def off(self, allowed: Limit) -> str:
        """By how much it differs, in the measure that counts."""
        if allowed.snr is None:
            return f"is off by {self.error:.2e} of its largest value"
        return f"has a signal-to-noise ratio of {self.snr:.1f} dB"


@dataclass(frozen=True)
class Comparison:
    """How two models compared.

    Attributes:
        worst: The largest relative error of all results.
        wrong: The first of those that are off by more than is allowed.
        snr: The smallest signal-to-noise ratio of all results; None where that did not count.
    """

    worst: float
    wrong: Difference | None
    snr: float | None = None


def compare(
    sizes: Iterable[Where],
    expected: Callable[[Where], Sequence[Results]],
    got: Callable[[Where, int], Sequence[Results]],
    allowed: Limit = Limit(),
) -> Comparison:
    """Compare two models at several sizes, call by call: the number of outputs, the outputs, the written buffers.

    Args:
        sizes: The sizes of inputs, whatever says them in words, or one None where the inputs are what they are.
        expected: Runs the model on inputs of these sizes, several times in a row where it keeps state.
        got: Runs the other one alike, as many times as it is told.
        allowed: How far apart they may lie.

    Example:
        >>> half_off = lambda n, calls: [Results([n, 2.0 if n == 1 else 2.5])]
        >>> found = compare([1, 3], lambda n: [Results([n, 2.0])], half_off)
        >>> found.worst, found.wrong.what, found.wrong.place
        (0.25, 'output 1', ' at 3')
    """
    worst, wrong, least = 0.0, None, math.inf
    for size in sizes:
        wanted = expected(size)
        for call, (one, other) in enumerate(zip(wanted, got(size, len(wanted)), strict=True)):
            counts = (len(one.outputs), len(other.outputs))
            for what, error, snr in _errors(one, other, with_snr=allowed.snr is not None):
                worst, least = max(worst, error), min(least, snr)
                if wrong is None and not allowed.allows(error, snr):
                    wrong = Difference(what=what, error=error, snr=snr, at=size, call=call, counts=counts)
    return Comparison(worst, wrong, None if allowed.snr is None else least)


def _errors(expected: Results, got: Results, *, with_snr: bool) -> Iterator[tuple[str, float, float]]:
    """What is compared, its relative error, and its signal-to-noise ratio, or infinity where that does not count."""
    if len(expected.outputs) != len(got.outputs):
        yield "the number of outputs", math.inf, -math.inf
        return
    pairs = [(f"output {i}", *pair) for i, pair in enumerate(zip(expected.outputs, got.outputs, strict=True))]
    pairs += [(f"the buffer {name}", value, got.buffers.get(name)) for name, value in expected.buffers.items()]
    for what, one, other in pairs:
        yield what, relative_error(one, other), signal_to_noise(one, other) if with_snr else math.inf


def tolerance(value_dtype: torch.dtype, layers: int) -> float:
    """The largest error allowed of a model, ``layers`` of whose weights are rounded to ``value_dtype``.

    A weight is off by at most 3.9e-3 of itself in bfloat16, 4.9e-4 in float16. The layers' errors are independent, so
    they add up as their squares do: whole networks are off by a third of that bound times the root of the number of
    layers, small ones with few outputs by up to all of it. Twice as much is allowed.

    Example:
        >>> tolerance(torch.float32, 50), tolerance(torch.bfloat16, 1), tolerance(torch.bfloat16, 16)
        (0.0001, 0.0078125, 0.03125)
    """
    if value_dtype is torch.float32:
        return TOLERANCE
    return max(TOLERANCE, torch.finfo(value_dtype).eps * math.sqrt(layers))


def relative_error(expected: Any, got: Any) -> float:
    """The largest difference over the largest expected value; infinite where type, shape or NaNs differ.

    Numbers that are not whole are compared as tensors are, complex ones by their absolute values; all else is equal or
    not.

    Example:
        >>> relative_error(torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]))
        0.25
        >>> relative_error(2.0, 2.5), relative_error(2, 3)
        (0.25, inf)
    """
    if isinstance(expected, float | complex) and isinstance(got, float | complex):
        expected, got = (torch.tensor(number, dtype=torch.complex128) for number in (expected, got))
    if not isinstance(expected, Tensor):
        return 0.0 if not isinstance(got, Tensor) and expected == got else float("inf")
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, got) else float("inf")
    finite = expected.isfinite()
    same = (expected == got) | (expected.isnan() & got.isnan())
    if not bool(same[~finite].all()) or not bool(got[finite].isfinite().all()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, scale = float((expected[finite] - got[finite]).abs().max()), float(expected[finite].abs().max())
    return difference / scale if scale else (float("inf") if difference else 0.0)


def signal_to_noise(expected: Any, got: Any) -> float:
    """The signal-to-noise ratio in dB; infinite where both are equal, minus infinity where the relative error is.

    Values that are not finite are left out, where they are the same on both sides.

    Example:
        >>> round(signal_to_noise(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5])), 6)
        20.0
    """
    error = relative_error(expected, got)
    if not error or error == math.inf:
        return -math.inf if error else math.inf
    one, other = torch.as_tensor(expected), torch.as_tensor(got)
    finite = one.isfinite()
    signal, noise = (_length(part[finite]) for part in (one, one - other))
    return 20 * math.log10(signal / noise) if signal and noise else (-math.inf if noise else math.inf)


def _length(values: Tensor) -> float:
    """The root of the sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(values.abs(), dtype=torch.float64))
