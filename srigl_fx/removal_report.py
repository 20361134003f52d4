"""What removing dead channels did to a model, in the words of its report.

Owns the records of removal and their text form. It must not know how channels are found or removed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from srigl_fx.report import format_table

FOLDS = {
    "bias": "constants folded into the bias",
    "map": "constants added as a map",
    "zero": "the removed inputs were zero",
}


@dataclass(frozen=True, kw_only=True)
class ConsumerReport:
    """A weight that lost the columns which read removed channels.

    Attributes:
        fqn: The weight's fully-qualified name.
        before: Columns of the matrix view before.
        after: Columns after.
        folded: What became of the constants the removed channels carried: "bias", "map" or "zero"; several where
            channels differ; empty where nothing was said.
    """

    fqn: str
    before: int
    after: int
    folded: tuple[str, ...] = ()

    @property
    def fold(self) -> str:
        """What became of the constants, in words.

        Example:
            >>> ConsumerReport(fqn="fc2.weight", before=512, after=310, folded=("bias",)).fold
            'constants folded into the bias'
        """
        return ", ".join(FOLDS.get(kind, kind) for kind in self.folded)


@dataclass(frozen=True, kw_only=True)
class RemovalReport:
    """What became of the neurons of one weight that are ablated or that nothing reads.

    Attributes:
        producer: The fully-qualified name of the weight whose rows these are.
        before: Rows before.
        after: Rows after.
        through: The operators between the producer and its consumers, in order.
        consumers: The weights that read the removed channels.
        kept: Ablated rows that stay, by reason.
    """

    producer: str
    before: int
    after: int
    through: tuple[str, ...] = ()
    consumers: tuple[ConsumerReport, ...] = ()
    kept: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as JSON would hold them."""
        consumers = [{**asdict(consumer), "folded": list(consumer.folded)} for consumer in self.consumers]
        return {**asdict(self), "through": list(self.through), "consumers": consumers}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "RemovalReport":
        """The inverse of :meth:`as_dict`.

        Example:
            >>> removal = RemovalReport(producer="fc1.weight", before=8, after=6, through=("relu",))
            >>> RemovalReport.from_dict(removal.as_dict()) == removal
            True
        """
        consumers = tuple(
            ConsumerReport(**{**consumer, "folded": tuple(consumer["folded"])}) for consumer in plain["consumers"]
        )
        return cls(**{**plain, "through": tuple(plain["through"]), "consumers": consumers, "kept": dict(plain["kept"])})


def format_removals(removals: Sequence[RemovalReport]) -> str:
    """Removals as text: a table of the channels that went, then the ablated rows that stay and why; "" without any.

    Example:
        >>> print(format_removals([RemovalReport(producer="fc1.weight", before=8, after=6, through=("relu",),
        ...     consumers=(ConsumerReport(fqn="fc2.weight", before=8, after=6, folded=("bias",)),))]))
        2 of 8 channels removed
        producer    channels  through  consumer    inputs  constants
        ----------  --------  -------  ----------  ------  ------------------------------
        fc1.weight    8 -> 6  relu     fc2.weight  8 -> 6  constants folded into the bias
    """
    gone = [removal for removal in removals if removal.after < removal.before]
    lines = []
    if gone:
        rows = []
        for removal in gone:
            head = (removal.producer, f"{removal.before} -> {removal.after}", ", ".join(removal.through))
            tails = [(to.fqn, f"{to.before} -> {to.after}", to.fold) for to in removal.consumers] or [("", "", "")]
            rows += [(*(head if first == 0 else ("", "", "")), *tail) for first, tail in enumerate(tails)]
        before, after = (sum(getattr(removal, name) for removal in removals) for name in ("before", "after"))
        lines.append(f"{before - after:,} of {before:,} channels removed")
        headers = ("producer", "channels", "through", "consumer", "inputs", "constants")
        lines.append(format_table(headers, rows, right=(1, 4)))
    stay = [(removal.producer, count, reason) for removal in removals for reason, count in removal.kept.items()]
    if stay:
        lines.append(f"{sum(count for _, count, _ in stay):,} ablated rows stay")
        lines.append(format_table(("weight", "rows", "reason"), stay, right=(1,)))
    return "\n".join(lines)
