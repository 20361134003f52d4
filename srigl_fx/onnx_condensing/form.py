"""In which form a layer is condensed, and whether that is better than the dense one.

Owns the choice, from the bytes and the estimated seconds of each form; it must not know how a form is written.

Rules:
    1. Rows of unequal lengths are padded to the longest, or cut into up to four groups of about the same length, each a
       node of its own, which adds the outputs of the one before.
    2. A form that takes as many bytes as the dense weight is none.
    3. Groups are taken where padding is none, or where they are estimated to be 1.1 times as fast at each batch size:
       a host without the operator library computes a dense layer for each group.
    4. The form must gain as much as is asked for, beside dense float32 or, where the source has that, dense eight bits.
"""

from dataclasses import dataclass, field
from typing import Final

from srigl_fx.onnx_condensing.constants import Array
from srigl_fx.onnx_condensing.match import Contraction, positions
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME, Work, condensed, dense
from srigl_fx.runtime.format import padding_problem
from srigl_fx.runtime.row_lengths import masks_by_length, places

BATCHES: Final = (1, 16)  # at which a layer must gain
# How many times as fast as in float32 ONNX Runtime computes a dense layer of eight bits, about, on a processor with
# VNNI: the ratio of the last two columns of "When int8" in docs/quantised.md.
_DENSE_EIGHT_BITS: Final = 4.0
_WORTH_GROUPS: Final = 1.1  # times as fast as padded


@dataclass
class Form:
    """How one contraction is condensed.

    Attributes:
        one: The contraction.
        kept: bool (n, F), the weights that are not zero.
        is_rounded: Whether the source computes it from bytes.
        eight_bits: Whether that is what is condensed.
        parts: bool (n, F) for each node; all but one are rows of other lengths.
    """

    one: Contraction
    kept: Array
    is_rounded: bool
    eight_bits: bool
    parts: list[Array] = field(init=False)
    _padding: str = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [self.kept]
        value_bytes = 1 if self.eight_bits else 4
        self._padding = padding_problem(self.kept, value_bytes)
        groups = masks_by_length(self.kept)
        if len(groups) < 2 or padding_problem(self.kept, value_bytes, groups):  # rule 2
            return
        faster = all(
            _WORTH_GROUPS * self._seconds(batch, groups) < self._seconds(batch, [self.kept]) for batch in BATCHES
        )
        if self._padding or faster:  # rule 3
            self.parts, self._padding = groups, ""

    @property
    def padding(self) -> str:
        """Why it cannot be condensed: it would take as many bytes as the dense weight; "" where it takes fewer."""
        return self._padding

    def problem(self, least: float) -> str:
        """Why it is better dense, or "" where it is not (rules 2 and 4)."""
        if self._padding:
            return self._padding
        for batch in BATCHES if least > 0 else ():
            speedup = self.dense_seconds(batch) / self.seconds(batch)
            if speedup < least:
                kind = "dense int8" if self.is_rounded else "dense"
                form = "condensed in float32" if self.is_rounded and not self.eight_bits else "condensed"
                return f"estimated: {form} is {speedup:.2f} times as fast as {kind} at batch {batch}"
        return ""

    def dense_seconds(self, batch: int) -> float:
        """What the dense layer is estimated to take."""
        return dense(self._work(self.kept, batch), ONNXRUNTIME) / (_DENSE_EIGHT_BITS if self.is_rounded else 1)

    def seconds(self, batch: int) -> float:
        """What this form is estimated to take."""
        return self._seconds(batch, self.parts)

    def _seconds(self, batch: int, parts: list[Array]) -> float:
        works = [self._work(part, batch) for part in parts]
        # Each node behind the first reads the outputs of the one before.
        again = (len(works) - 1) * works[0].rows * works[0].columns / ONNXRUNTIME.move_rate
        return sum(condensed(work, ONNXRUNTIME) for work in works) + again

    def _work(self, part: Array, batch: int) -> Work:
        return Work(
            rows=len(part),
            fan_in=part.shape[1],
            active=int(part.any(axis=1).sum()),
            kept=places(part.sum(axis=1)),
            columns=max(1, positions(self.one, batch)),
            convolution=self.one.convolution is not None,
            value_bytes=1 if self.eight_bits else 4,
            eight_bits=self.eight_bits,
        )
