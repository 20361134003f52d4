"""The subject of the training passes: a model, what was found in it, and what is going to be done to it.

Owns the plan of one ``sparsify`` call. Until :class:`~srigl_fx.passes.insert_masks.InsertMasks` runs, the model is
only read, so an error of any earlier pass leaves it as it was.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from srigl_fx.masks.records import WeightRecord, WeightSite
from srigl_fx.nn.effective import Transform


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One weight of two or more dimensions.

    Attributes:
        site: Where it is and how its neurons lie.
        owner: The module that holds it; of a parametrised weight, the one with the parametrisation.
        reason: Why it can only stay dense; "" where it can be made sparse.
        reached: False where the library could not find out how the weight is used.
        compensated: Whether the distribution covers it all the same, so that other weights make up for its density.
        transforms: The forwards that transform it before they use it.
    """

    site: WeightSite
    owner: nn.Module
    reason: str = ""
    reached: bool = True
    compensated: bool = False
    transforms: tuple[Transform, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightFit:
    """How near a pruned layer is to the dense one, on the inputs it was fitted to.

    Errors are shares of the expected square of the layer's output, about its mean where a bias makes up for that: 0 is
    as before, 1 as if all weights were zero.

    Attributes:
        name: The weight's name.
        samples: Rows of inputs that it was fitted to: tokens, or places of an image.
        magnitude_error: With the largest weights kept as they are.
        mask_error: With those kept as they are that are largest times their inputs' spread.
        error: With the mask and the values that were fitted.
        reason: Why nothing was fitted; "" where it was.
    """

    name: str
    samples: int = 0
    magnitude_error: float | None = None
    mask_error: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass
class Draft:
    """A model on its way to being sparse.

    Attributes:
        model: The model, untouched until masks are inserted.
        findings: Filled by discovery, in registration order.
        records: Filled by the budget pass: the decision for each finding, by FQN.
        masks: Filled by the mask pass: bool masks of the weights' shapes, by FQN.
        values: Filled by the mask pass: the new values of the weights, zero off the mask, by FQN; and of biases that
            change with them.
        fits: Where weights were fitted: how well, by FQN.
        asked: The recipe of the call, without decisions; every record keeps it. Nothing here looks into it.
    """

    model: nn.Module
    findings: list[Finding] = field(default_factory=list)
    records: dict[str, WeightRecord] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    fits: dict[str, WeightFit] = field(default_factory=dict)
    asked: object | None = None

    def copy(self) -> "Draft":
        """The same plan for the same model, to be changed by itself."""
        return replace(
            self,
            findings=list(self.findings),
            records=dict(self.records),
            masks=dict(self.masks),
            values=dict(self.values),
            fits=dict(self.fits),
        )
