"""What removing dead channels came to, in words.

Owns the text form of :class:`~srigl_fx.passes.removal.Removals`. It must not know how channels are found or removed.
"""

from collections.abc import Mapping

from srigl_fx.passes.removal import Removals
from srigl_fx.report import format_table

_FOLDS = {
    "zero": "contributed nothing",
    "bias": "folded into the bias",
    "carrier": "carried by one constant channel",
    "map": "added as a constant map",
}


def describe_folds(folded: Mapping[str, int]) -> str:
    """What became of the constants in removed columns.

    Example:
        >>> describe_folds({"bias": 12, "zero": 3})
        '12 folded into the bias, 3 contributed nothing'
    """
    return ", ".join(f"{count} {_FOLDS.get(how, how)}" for how, count in folded.items())


def format_removals(removals: Removals) -> str:
    """Totals, a table of the weights that lost channels, and one of the ablated rows that stay; "" without either.

    Example:
        >>> from srigl_fx.passes.removal import Link, Removal
        >>> fc1 = Removal(fqn="fc1.weight", rows=8, ablated=2, rows_removed=2, columns=4, columns_removed=0)
        >>> fc2 = Removal(fqn="fc2.weight", rows=3, ablated=0, rows_removed=0, columns=8, columns_removed=2,
        ...     folded={"bias": 2})
        >>> link = Link(producer=0, reader=1, through=("relu",))
        >>> print(format_removals(Removals(weights=(fc1, fc2), channels=(11, 9), parameters=(67, 51), flops=(112, 84),
        ...     links=(link,))))
        channels 11 -> 9, parameters 67 -> 51, FLOPs a sample 112 -> 84
        weight        rows  columns  read by     constants
        ----------  ------  -------  ----------  ----------------------
        fc1.weight  8 -> 6        4  fc2.weight
        fc2.weight       3   8 -> 6              2 folded into the bias
    """
    lines = []
    if any(weight.rows_removed or weight.columns_removed for weight in removals.weights):
        names = (("channels", "channels"), ("parameters", "parameters"), ("flops", "FLOPs a sample"))
        totals = ((label, *getattr(removals, name)) for name, label in names)
        lines.append(", ".join(f"{label} {before:,} -> {after:,}" for label, before, after in totals))
        readers: dict[int, list[str]] = {}
        for link in removals.links:
            readers.setdefault(link.producer, []).append(removals.weights[link.reader].fqn)
        rows = [
            (
                weight.fqn,
                _change(weight.rows, weight.rows_removed),
                _change(weight.columns, weight.columns_removed),
                ", ".join(readers.get(position, ())),
                describe_folds(weight.folded),
            )
            for position, weight in enumerate(removals.weights)
            if weight.rows_removed or weight.columns_removed
        ]
        lines.append(format_table(("weight", "rows", "columns", "read by", "constants"), rows, right=(1, 2)))
    stay = [(weight.fqn, count, reason) for weight in removals.weights for reason, count in weight.kept.items()]
    if stay:
        lines.append(f"{sum(count for _, count, _ in stay):,} ablated rows stay")
        lines.append(format_table(("weight", "rows", "reason"), stay, right=(1,)))
    return "\n".join(lines)


def _change(count: int, removed: int) -> str:
    return f"{count} -> {count - removed}" if removed else str(count)
