"""A call of ``sparsify`` that can be saved, compared and given back: what it asked for, and what it decided.

Owns :class:`Recipe`, its file, and how the recipe of a model is put together from the records beside its masks. It must
not know how weights are found, or how a recipe is followed.

A file is untrusted: every value is checked, and nothing that it names is imported or run.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from srigl_fx.errors import RecipeError, RuleError
from srigl_fx.files import replacing
from srigl_fx.masks.decisions import WeightDecision
from srigl_fx.masks.distributions import DISTRIBUTIONS, is_distribution
from srigl_fx.masks.initialisation import WeightInit
from srigl_fx.masks.presence import parameter_on
from srigl_fx.masks.records import Structure, WeightRecord, all_records, plain
from srigl_fx.masks.structures import MaskInit
from srigl_fx.reports.text_tables import format_table
from srigl_fx.specs import AskedRule as AskedRule
from srigl_fx.specs import RuleSet, check_block_width, check_group_size, check_sparsity

VERSION = 3
REPLACEABLE = ("mask_init", "weight_init", "seed")  # what sparsify takes from a recipe beside the decisions
_FORMAT = "srigl_fx.recipe"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``sparsify`` was asked for, and what it decided for each weight; ``str()`` is a table.

    It rides with the masks: :func:`srigl_fx.recipe` gives that of a model. Two recipes are equal if the calls and the
    decisions were. ``dataclasses.replace(recipe, seed=1)`` is the same with other draws; ``mask_init``, ``weight_init``
    and decisions in ``weights`` can be replaced, too. What these were decided by cannot.

    Attributes:
        sparsity: Fraction of weights that the call removed.
        distribution: Its name, or (name, density) pairs where the call gave a mapping.
        rules: The rules, in their order.
        structure: The mask structure asked for.
        group_size: How many neighbouring rows were to share their inputs.
        block_width: How many neighbouring inputs a block was to have.
        mask_init: How the first masks were chosen.
        weight_init: How the kept weights started.
        strict: Whether the call was strict.
        seed: The seed of masks and initial values.
        filtered: Whether the call had a ``filter_fn``; the function itself is not kept, what it decided is.
        weights: What was decided, for each weight of two or more dimensions, in registration order.

    Raises:
        RecipeError: A value is out of range, two decisions are of one weight, or ``dataclasses.replace`` would change
            what the decisions were taken by.

    Example:
        >>> import srigl_fx as sx
        >>> def build():
        ...     return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> recipe = sx.recipe(sx.sparsify(build(), sparsity=0.75, distribution="uniform", rules={"2": None}))
        >>> print(recipe)
        sparsity 0.75, distribution uniform, constant_fan_in, masks by magnitude, weights keep, seed 0, 1 rule
        1 of 2 weights sparse, which may keep 832 of 2368 entries (the budgets, dense weights included)
        <BLANKLINE>
        weight    shape  structure        budget  fan-in  density  why dense
        --------  -----  ---------------  ------  ------  -------  ----------------------------
        0.weight  32x64  constant_fan_in     512      16     0.25
        2.weight  10x32  dense               320                1  the rule '2' leaves it dense
        >>> sx.recipe(sx.sparsify(build(), recipe=recipe)) == recipe
        True
    """

    sparsity: float = 0.9
    distribution: str | tuple[tuple[str, float], ...] = "erk"
    rules: tuple[AskedRule, ...] = ()
    structure: Structure = "constant_fan_in"
    group_size: int = 1
    block_width: int = 1
    mask_init: MaskInit = "magnitude"
    weight_init: WeightInit = "keep"
    strict: bool = False
    seed: int = 0
    filtered: bool = False
    weights: tuple[WeightDecision, ...] = ()
    # By what the decisions were taken: dataclasses.replace hands it on, and so cannot change it unseen.
    _decided_by: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            check_sparsity(self.sparsity, "Recipe")
            check_group_size(self.group_size, "Recipe")
            check_block_width(self.block_width, "Recipe")
        except RuleError as error:
            raise RecipeError(str(error)) from error
        for name, choices in (("structure", Structure), ("mask_init", MaskInit), ("weight_init", WeightInit)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise RecipeError(f"Recipe: {name} must be one of {get_args(choices)}, not {value!r:.80}")
        if not is_distribution(self.distribution):
            raise RecipeError(
                f"Recipe: distribution must be one of {sorted(DISTRIBUTIONS)} or pairs of names and densities, not "
                f"{self.distribution!r:.80}"
            )
        for name, kind in (("strict", bool), ("filtered", bool), ("seed", int), ("rules", tuple), ("weights", tuple)):
            if type(value := getattr(self, name)) is not kind:
                raise RecipeError(f"Recipe: {name} must be of type {kind.__name__}, not {value!r:.80}")
        if not all(isinstance(rule, AskedRule) for rule in self.rules):
            raise RecipeError("Recipe: rules must be AskedRules")
        if not all(isinstance(weight, WeightDecision) for weight in self.weights):
            raise RecipeError("Recipe: weights must be WeightDecisions")
        if twice := [name for name, count in Counter(weight.name for weight in self.weights).items() if count > 1]:
            raise RecipeError(f"Recipe: there are two decisions for {', '.join(map(repr, twice[:5]))}")
        self._keep_decided_by()

    def _keep_decided_by(self) -> None:
        asked = {name: getattr(self, name) for name in _saved() if name not in (*REPLACEABLE, "weights")}
        before = self._decided_by if self.weights else None
        if before is not None and (changed := [name for name in asked if asked[name] != before[name]]):
            raise RecipeError(
                f"a recipe's {', '.join(changed)} cannot be replaced: what each weight keeps was decided by "
                f"{'it' if len(changed) == 1 else 'them'}, and would not change. Call sparsify with other arguments, "
                f"without a recipe; {', '.join(REPLACEABLE)} can be replaced"
            )
        object.__setattr__(self, "_decided_by", asked if self.weights else None)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as JSON holds it, with a version."""
        mapped = self.distribution if isinstance(self.distribution, str) else dict(self.distribution)
        return {
            "format": _FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _saved()},
            "distribution": mapped,
            "rules": [rule.to_dict() for rule in self.rules],
            "weights": [weight.to_dict() for weight in self.weights],
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Recipe":
        """The recipe that :meth:`to_dict` described, in this version or an earlier one.

        Raises:
            RecipeError: ``data`` is no recipe, of a newer version, or damaged.

        Example:
            >>> Recipe.from_dict(Recipe(sparsity=0.8).to_dict()) == Recipe(sparsity=0.8)
            True
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise RecipeError("this is no recipe of srigl_fx: srigl_fx.recipe(model).to_dict() is one")
        version = data.get("version")
        if type(version) is not int or version < 1:
            raise RecipeError(f"the recipe is damaged: its version is {version!r:.80}, and not a number from 1 on")
        if version > VERSION:
            raise RecipeError(
                f"the recipe is of version {version!r:.80}, but this srigl_fx reads versions up to {VERSION}: update it"
            )
        # Rows did not share their inputs in version 1, and there were no blocks before version 3.
        absent = {name: 1 for name, since in (("group_size", 2), ("block_width", 3)) if version < since}
        known = set(_saved()) - absent.keys()
        given = data.keys() - {"format", "version"}
        if given != known:
            odd = [
                f"{name!r} is {'missing' if name in known else 'unknown'}" for name in sorted(map(str, given ^ known))
            ]
            raise RecipeError(f"the recipe is damaged: {', '.join(odd[:5])}; save it again")
        try:
            spread, rules, weights = data["distribution"], data["rules"], data["weights"]
            if not isinstance(rules, list) or not isinstance(weights, list):
                raise RecipeError("rules and weights must be lists")
            read = {
                "distribution": tuple(spread.items()) if isinstance(spread, Mapping) else spread,
                "rules": tuple(map(AskedRule.from_dict, rules)),
                "weights": tuple(WeightDecision.from_dict({**one, **absent} if absent else one) for one in weights),
            }
            return cls(**{**{name: data[name] for name in known}, **read})
        except Exception as error:
            # Values of any type may stand anywhere; unhashable ones and the like fail in their own way.
            raise RecipeError(f"the recipe is damaged ({type(error).__name__}: {error}); save it again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to a JSON file, which appears whole or not at all.

        Raises:
            RecipeError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Recipe(sparsity=0.8).save(f"{folder}/recipe.json")
            ...     Recipe.load(f"{folder}/recipe.json").sparsity
            0.8
        """
        try:
            with replacing(path) as part:
                part.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except (OSError, TypeError, ValueError) as error:  # the latter two where the path is none
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"{path} cannot be written ({reason}): does its folder exist, with space left?"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read what :meth:`save` wrote; the file may come from anywhere, nothing in it is run.

        Raises:
            RecipeError: There is no such file, it is no recipe, of a newer version, or damaged.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # editors may put a mark of the encoding in front
        except FileNotFoundError as error:
            raise RecipeError(f"there is no file {path}; srigl_fx.recipe(model).save(path) writes one") from error
        except (OSError, TypeError, ValueError) as error:  # no text, or no path
            raise RecipeError(f"{path} cannot be read ({error}): give the path of a recipe") from error
        try:
            return cls.from_dict(parse(text))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def __str__(self) -> str:
        spread = self.distribution if isinstance(self.distribution, str) else "given by name"
        structure = _shared(self.structure, self.group_size, self.block_width)
        asked = [
            f"sparsity {self.sparsity:g}, distribution {spread}, {structure}",
            f"masks by {self.mask_init}",
            f"weights {self.weight_init}, seed {self.seed}",
        ]
        asked += [f"{len(self.rules)} rule{'' if len(self.rules) == 1 else 's'}"] if self.rules else []
        asked += ["with a filter_fn"] if self.filtered else []
        asked += ["strict"] if self.strict else []
        rows = [
            (
                weight.name,
                "x".join(map(str, weight.shape)),
                _shared(weight.structure, weight.group_size, weight.block_width) if weight.structure else "dense",
                weight.budget,
                "" if weight.fan_in is None else weight.fan_in,
                f"{weight.density:.3g}",
                weight.reason,
            )
            for weight in self.weights
        ]
        kept, sizes = sum(row.budget for row in self.weights), sum(row.size for row in self.weights)
        sparse = sum(weight.sparse for weight in self.weights)
        said = f"{', '.join(asked)}\n{sparse} of {len(rows)} weights sparse, which may keep "
        said += f"{kept} of {sizes} entries (the budgets, dense weights included)"
        headers = ("weight", "shape", "structure", "budget", "fan-in", "density", "why dense")
        return f"{said}\n\n{format_table(headers, rows, right=(3, 4, 5))}" if rows else ", ".join(asked)


def recipe(model: nn.Module) -> Recipe:
    """The recipe of a model that was sparsified: what the call asked for, and what was decided for each weight.

    Names in it are those of the module that ``sparsify`` was called with; wrappers around it do not matter.

    Raises:
        RecipeError: The model has no masks, or those of several calls: ask for the recipe of each of the parts then, or
            use :func:`recipes_of`.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(64, 32)), sparsity=0.5)
        >>> found = sx.recipe(model)
        >>> found.sparsity, found.weights[0].name, found.weights[0].fan_in
        (0.5, '0.weight', 32)
    """
    found = recipes_of(model)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise RecipeError(
            f"parts of this {type(model).__name__} were sparsified by calls of their own "
            f"({', '.join(map(repr, found))}): ask for the recipe of each part"
        )
    raise RecipeError(
        f"this {type(model).__name__} has no recipe: it was not sparsified, or unpickled from a release that kept "
        "none. What srigl_fx.lower returned has that of its model as .recipe"
    )


def recipes_of(model: nn.Module) -> dict[str, Recipe]:
    """The recipes of a model's parts, by the names of the modules that ``sparsify`` was called with.

    The model itself is named ""; of a part that was taken out of a sparsified model, the recipe covers that part.

    Example:
        >>> import srigl_fx as sx
        >>> parts = nn.ModuleDict({"encoder": nn.Linear(64, 32), "head": nn.Linear(32, 10)})
        >>> _ = sx.sparsify(parts["encoder"], sparsity=0.5)
        >>> list(recipes_of(parts)), list(recipes_of(nn.Linear(3, 2)))
        (['encoder'], [])
    """
    asked: dict[str, Recipe] = {}
    decided: dict[str, list[WeightDecision]] = {}
    found = list(all_records(model))
    # A child may be called "module", and its weights like those beside it but for that.
    name_of = plain if len({plain(fqn) for fqn, _, _ in found}) == len(found) else str
    for fqn, owner, record in found:
        if not isinstance(record.asked, Recipe):
            continue
        live, given = name_of(fqn), name_of(record.site.fqn)
        part = live.removesuffix(given).removesuffix(".") if _ends_with(live, given) else ""
        asked.setdefault(part, record.asked)
        name = live.removeprefix(f"{part}." if part else "")
        decided.setdefault(part, []).append(WeightDecision.of(name, _as_it_is(record, owner)))
    return {part: replace(asked[part], weights=tuple(weights)) for part, weights in decided.items()}


def _as_it_is(record: WeightRecord, owner: nn.Module) -> WeightRecord:
    """A record with the shape that its weight has by now, where that stays dense: an embedding table may have grown."""
    parameter = parameter_on(owner, record.site.attr)
    # Where processes share out all weights in one, each of them has no shape of its own.
    if record.sparse or parameter is None or parameter.dim() < 2 or parameter.shape == record.site.shape:
        return record
    site = replace(record.site, shape=tuple(parameter.shape), view=(), neuron_axes=(), input_axes=(), blocks=())
    return replace(record, site=site)


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RecipeError: It is no JSON.

    Example:
        >>> parse('{"seed": 3}')
        {'seed': 3}
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"this is no recipe, or a damaged one ({type(error).__name__}: {error})") from error


def asked_for(*, rules: RuleSet, distribution: str | Mapping[str, float], filtered: bool, **plainly: Any) -> Recipe:
    """The recipe of a call of ``sparsify``, before anything is decided.

    Example:
        >>> rules = RuleSet({"head": 0.5, nn.Conv2d: None})
        >>> asked_for(rules=rules, distribution="erk", filtered=False, seed=1).rules[1].key
        'torch.nn.modules.conv.Conv2d'
    """
    return Recipe(
        distribution=distribution if isinstance(distribution, str) else tuple(distribution.items()),
        rules=rules.asked(),
        filtered=filtered,
        **plainly,
    )


def _shared(structure: Structure, group_size: int, block_width: int) -> str:
    """A structure in words."""
    if structure == "block":
        return f"{structure}s of {group_size}x{block_width}"
    return structure if group_size == 1 else f"{structure}, groups of {group_size}"


def _saved() -> list[str]:
    """The fields of a recipe that are written to files."""
    return [one.name for one in fields(Recipe) if not one.name.startswith("_")]


def _ends_with(live: str, given: str) -> bool:
    return live == given or live.endswith("." + given)
