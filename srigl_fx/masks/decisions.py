"""What was decided for one weight, as plain data that outlives its model.

Owns :class:`WeightDecision`: its checks, its form as JSON, and the look at a record that gives it. It must not know
what the call of ``sparsify`` asked for (:mod:`srigl_fx.recipes`), or how a decision is followed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from srigl_fx.errors import RecipeError
from srigl_fx.masks.records import Structure, WeightRecord
from srigl_fx.masks.row_groups import GROUP_SIZES


@dataclass(frozen=True, kw_only=True)
class WeightDecision:
    """What was decided for one weight.

    Attributes:
        name: The weight's name in the model, without the prefixes of wrappers.
        shape: Its shape.
        rows: The neurons of each block of its matrix view; most weights are one block.
        structure: The mask structure, or None where the weight stays dense.
        reason: Why it stays dense ("" where it is sparse).
        budgets: For each block, the number of weights it may keep; empty where the weight stays dense.
        ablation: For each block, its own ablation threshold from a rule; None means the trainer's.
        group_size: Neighbouring rows of a block that share their inputs; 1 leaves each row by itself.
        block_width: With the structure "block", neighbouring inputs that such rows keep together or not at all.
        feeds_output: Whether it was seen to feed an output; None where nobody looked.

    Raises:
        RecipeError: The values contradict one another.

    Example:
        >>> kept = {"rows": (8,), "structure": "constant_fan_in", "budgets": (130,), "ablation": (None,)}
        >>> decision = WeightDecision(name="fc.weight", shape=(8, 64), **kept)
        >>> decision.fan_in, decision.budget, decision.density
        (16, 130, 0.25390625)
        >>> WeightDecision.from_dict(decision.to_dict()) == decision
        True
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    structure: Structure | None = None
    reason: str = ""
    budgets: tuple[int, ...] = ()
    ablation: tuple[float | None, ...] = ()
    group_size: int = 1
    block_width: int = 1
    feeds_output: bool | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise RecipeError(f"the recipe's entry for the weight {self.name!r} is malformed: {problem}")

    @property
    def sparse(self) -> bool:
        """Whether the weight gets a mask."""
        return self.structure is not None

    @property
    def size(self) -> int:
        """The number of its weights, masked or not."""
        return math.prod(self.shape)

    @property
    def budget(self) -> int:
        """The number of weights it may keep: all of them where it stays dense."""
        return sum(self.budgets) if self.sparse else self.size

    @property
    def density(self) -> float:
        """The share of its weights that it may keep, in (0, 1]."""
        return self.budget / self.size if self.sparse else 1.0

    @property
    def fan_in(self) -> int | None:
        """The inputs that a neuron keeps while none is ablated; None where that is not the same for all of them."""
        if self.structure != "constant_fan_in":
            return None
        found = {budget // rows for budget, rows in zip(self.budgets, self.rows, strict=True)}
        return found.pop() if len(found) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The decision as plain data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> "WeightDecision":
        """The decision that :meth:`to_dict` described.

        Raises:
            RecipeError: ``data`` is no such description.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != known:
            raise RecipeError(
                f"the recipe's entry for a weight must have the fields {sorted(known)}, not {data!r:.200}"
            )
        values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in data.items()}
        return cls(**values)

    @classmethod
    def of(cls, name: str, record: WeightRecord) -> "WeightDecision":
        """What a record says, for the weight of this name."""
        return cls(
            name=name,
            shape=record.site.shape,
            rows=tuple(block.rows for block in record.site.blocks),
            structure=record.structure,
            reason=record.reason,
            budgets=record.budgets,
            ablation=record.ablation,
            group_size=record.group_size,
            block_width=record.block_width,
            feeds_output=record.site.feeds_output,
        )

    def _problem(self) -> str:
        """What is wrong with the values, of whatever type they are; "" if nothing."""
        if not isinstance(self.name, str) or not self.name:
            return "its name is no text"
        for what, value in (("shape", self.shape), ("rows", self.rows), ("budgets", self.budgets)):
            if not isinstance(value, tuple) or not all(_is_count(number) for number in value):
                return f"{what} must be whole numbers of at least 0, not {value!r:.80}"
        if not isinstance(self.reason, str):
            return f"its reason is no text: {self.reason!r:.80}"
        if not (self.feeds_output is None or isinstance(self.feeds_output, bool)):
            return f"feeds_output must be true, false or null, not {self.feeds_output!r:.80}"
        if not isinstance(self.ablation, tuple) or not all(one is None or _is_threshold(one) for one in self.ablation):
            return f"ablation thresholds must be null or finite and at least 0, not {self.ablation!r:.80}"
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            return f"the group size must be one of {GROUP_SIZES}, not {self.group_size!r:.80}"
        if type(self.block_width) is not int or self.block_width not in GROUP_SIZES:
            return f"the block width must be one of {GROUP_SIZES}, not {self.block_width!r:.80}"
        if self.block_width > 1 and self.structure != "block":
            return f'it has blocks of {self.block_width} inputs, but not the structure "block"'
        if self.structure is None:
            return "it stays dense, but has budgets" if self.budgets or self.ablation else ""
        if self.reason:
            return f"it is sparse, but has a reason why it stays dense: {self.reason!r:.80}"
        if self.structure not in get_args(Structure):
            return f"the structure must be one of {get_args(Structure)}, not {self.structure!r:.80}"
        if not len(self.rows) == len(self.budgets) == len(self.ablation) > 0:
            return "there must be as many budgets and ablation thresholds as blocks of rows"
        size, neurons = self.size, sum(self.rows)
        if not size or not neurons or size % neurons:
            return f"{neurons} neurons do not share out the {size} weights of the shape {self.shape}"
        if size // neurons % self.block_width:
            return f"{size // neurons} inputs are no whole blocks of {self.block_width}"
        for rows, budget in zip(self.rows, self.budgets, strict=True):
            least = rows if self.structure == "constant_fan_in" else 1
            if not max(1, least) <= budget <= rows * (size // neurons):
                return f"a block of {rows} neurons with {size // neurons} inputs each cannot keep {budget} weights"
        return ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_threshold(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
