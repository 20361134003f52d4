"""What removing channels came to, for the report.

Owns the records. It must not know how channels are found or removed.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was removed from one weight.

    Attributes:
        fqn: The weight, or the tensor of the graph where it is not mask-managed.
        rows: Its rows (output channels).
        ablated: How many of them keep no weight.
        rows_removed: How many were removed, ablated or not.
        columns: Its columns (input channels).
        columns_removed: How many were removed.
        folded: How many removed columns went where: "zero" (they contributed nothing), "bias", "carrier" (a constant
            channel that stays), "map" (a constant that is added).
        kept: Why ablated rows are still there: reason -> how many.
    """

    fqn: str
    rows: int
    ablated: int
    rows_removed: int
    columns: int
    columns_removed: int
    folded: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A weight whose removed rows made channels that removed columns of another read.

    Attributes:
        producer: The position of the one among the :class:`Removals`' weights.
        reader: That of the other.
        through: The operators between them, in order.
    """

    producer: int
    reader: int
    through: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Removals:
    """What was removed from a graph.

    Attributes:
        weights: By contraction, in the graph's order.
        channels: The rows of all contractions' weights, before and after.
        parameters: The numbers the graph reads, before and after.
        flops: Of contractions with weights on one sample, two for each multiplication and addition, before and after.
        links: Who read whose removed channels.
    """

    weights: tuple[Removal, ...]
    channels: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    links: tuple[Link, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as JSON would hold them."""
        links = [{**asdict(link), "through": list(link.through)} for link in self.links]
        totals = {name: list(getattr(self, name)) for name in ("channels", "parameters", "flops")}
        return {"weights": [asdict(weight) for weight in self.weights], **totals, "links": links}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Removals":
        """The inverse of :meth:`as_dict`.

        Example:
            >>> link = Link(producer=0, reader=1, through=("relu",))
            >>> removals = Removals(weights=(), channels=(8, 6), parameters=(80, 60), flops=(160, 120), links=(link,))
            >>> Removals.from_dict(removals.as_dict()) == removals
            True
        """
        weights = tuple(Removal(**weight) for weight in plain["weights"])
        links = tuple(Link(**{**link, "through": tuple(link["through"])}) for link in plain["links"])
        channels, parameters, flops = ((plain[name][0], plain[name][1]) for name in ("channels", "parameters", "flops"))
        return cls(weights=weights, channels=channels, parameters=parameters, flops=flops, links=links)
