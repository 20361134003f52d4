"""What removing dead channels came to, in words.

Owns the text form of :class:`~srigl_fx.passes.removal.Removals`. It must not know how channels are found or removed.
"""

from collections.abc import Mapping, Sequence

from srigl_fx.passes.removal import Removals
from srigl_fx.reports.text_tables import format_table

_OUTPUT = "it is an output of the model"
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


def why_kept(reason: str, *, in_parts: bool) -> str:
    """Why ablated rows stay: the output of a part of a model is not the model's.

    Example:
        >>> why_kept("it is an output of the model", in_parts=True)
        'code outside this graph reads it'
    """
    return "code outside this graph reads it" if in_parts and reason == _OUTPUT else reason


def format_removals(removals: Sequence[Removals], *, in_parts: bool = False) -> str:
    """Totals, a table of the weights that lost channels, and one of the ablated rows that stay; "" without either.

    Args:
        removals: What was removed, for each graph.
        in_parts: Whether the graphs are parts of a model.

    Example:
        >>> from srigl_fx.passes.removal import Link, Removal
        >>> fc1 = Removal(fqn="fc1.weight", rows=8, ablated=2, rows_removed=2, columns=4, columns_removed=0)
        >>> fc2 = Removal(fqn="fc2.weight", rows=3, ablated=0, rows_removed=0, columns=8, columns_removed=2,
        ...     folded={"bias": 2})
        >>> link = Link(producer=0, reader=1, through=("relu",))
        >>> print(format_removals([Removals(weights=(fc1, fc2), channels=(11, 9), parameters=(67, 51), flops=(112, 84),
        ...     links=(link,))]))
        channels 11 -> 9, parameters 67 -> 51, FLOPs a sample 112 -> 84
        weight        rows  columns  read by     constants
        ----------  ------  -------  ----------  ----------------------
        fc1.weight  8 -> 6        4  fc2.weight
        fc2.weight       3   8 -> 6              2 folded into the bias
    """
    lines = []
    rows = [row for one in removals for row in _changes(one)]
    if rows:
        names = (("channels", "channels"), ("parameters", "parameters"), ("flops", "FLOPs a sample"))
        totals = (
            (label, *map(sum, zip(*(getattr(one, name) for one in removals), strict=True))) for name, label in names
        )
        lines.append(", ".join(f"{label} {before:,} -> {after:,}" for label, before, after in totals))
        lines.append(format_table(("weight", "rows", "columns", "read by", "constants"), rows, right=(1, 2)))
    weights = [weight for one in removals for weight in one.weights]
    stay = [(w.fqn, count, why_kept(why, in_parts=in_parts)) for w in weights for why, count in w.kept.items()]
    if stay:
        count = sum(count for _, count, _ in stay)
        lines.append(f"{count:,} ablated row{' stays' if count == 1 else 's stay'}")
        lines.append(format_table(("weight", "rows", "reason"), stay, right=(1,)))
    return "\n".join(lines)


def _changes(removals: Removals) -> list[tuple[str, ...]]:
    """A row for each weight that lost rows or columns."""
    readers: dict[int, list[str]] = {}
    for link in removals.links:
        readers.setdefault(link.producer, []).append(removals.weights[link.reader].fqn)
    return [
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


def _change(count: int, removed: int) -> str:
    return f"{count} -> {count - removed}" if removed else str(count)
