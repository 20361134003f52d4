"""What a user may ask for a layer: :class:`LayerSpec`, and the rules that assign one to a weight, or anything else.

Owns the meaning and the precedence of rules; it must not know how weights are discovered or masked.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, Literal, TypeVar, get_args

from torch import nn

from srigl_fx.errors import RecipeError, RuleError
from srigl_fx.masks.records import Structure, plain
from srigl_fx.masks.row_groups import GROUP_SIZES

RuleKey = str | type[nn.Module]


def check_sparsity(sparsity: object, where: str) -> float:
    """Return ``sparsity`` as a float in [0, 1).

    Raises:
        RuleError: If it is no number in [0, 1); ``where`` says whose it is.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= float(sparsity) < 1.0:
        raise RuleError(
            f"{where}: sparsity is the fraction of weights removed and must lie in [0, 1), got {sparsity!r}"
            + ("; for 90 % write 0.9" if isinstance(sparsity, int | float) and sparsity >= 1 else "")
        )
    return float(sparsity)


def check_group_size(size: object, where: str) -> int:
    """Return ``size`` as one of the numbers of rows that can share their inputs.

    Raises:
        RuleError: If it is none of them; ``where`` says whose it is.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size not in GROUP_SIZES:
        raise RuleError(
            f"{where}: group_size is the number of neighbouring rows that share their inputs and must be one of "
            f"{GROUP_SIZES}, got {size!r:.80}; 1 leaves each row by itself"
        )
    return size


def check_block_width(width: object, where: str) -> int:
    """Return ``width`` as one of the numbers of inputs that a block can have.

    Raises:
        RuleError: If it is none of them; ``where`` says whose it is.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width not in GROUP_SIZES:
        raise RuleError(
            f"{where}: block_width is the number of neighbouring inputs that a block has and must be one of "
            f"{GROUP_SIZES}, got {width!r:.80}"
        )
    return width


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a rule asks for a layer; a field left None follows the call's defaults.

    Attributes:
        sparsity: Fraction of weights removed, in [0, 1).
        fan_in: Weights kept per neuron, instead of a sparsity.
        ablation: The SRigL ablation threshold of this layer, in the trainer's ``ablation_mode``; 0 turns it off.
        structure: ``"constant_fan_in"``, ``"unstructured"`` or ``"block"``.
        group_size: Neighbouring rows that share their inputs: 1, 2, 4, 8, 16 or 32.
        block_width: Of the structure "block", neighbouring inputs of one block: 1, 2, 4, 8, 16 or 32.

    Raises:
        RuleError: If a value is out of range, or both ``sparsity`` and ``fan_in`` are given.

    Example:
        >>> LayerSpec(fan_in=64, ablation=0.0)
        LayerSpec(sparsity=None, fan_in=64, ablation=0.0, structure=None, group_size=None, block_width=None)
        >>> LayerSpec.from_dict(LayerSpec(sparsity=0.5).to_dict()).sparsity
        0.5
    """

    sparsity: float | None = None
    fan_in: int | None = None
    ablation: float | None = None
    structure: Structure | None = None
    group_size: int | None = None
    block_width: int | None = None

    VERSION = 3

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity(self.sparsity, "LayerSpec")
            if self.fan_in is not None:
                raise RuleError("LayerSpec: give sparsity or fan_in, not both")
        if self.fan_in is not None and (
            isinstance(self.fan_in, bool) or not isinstance(self.fan_in, int) or self.fan_in < 1
        ):
            raise RuleError(
                f"LayerSpec: fan_in is the number of weights kept per neuron, at least 1, got {self.fan_in!r}"
            )
        number = isinstance(self.ablation, int | float) and not isinstance(self.ablation, bool)
        if self.ablation is not None and not (number and math.isfinite(self.ablation) and self.ablation >= 0):
            raise RuleError(f"LayerSpec: ablation must be finite and at least 0, got {self.ablation!r}")
        if self.structure is not None and self.structure not in get_args(Structure):
            raise RuleError(f"LayerSpec: structure must be one of {get_args(Structure)}, got {self.structure!r}")
        if self.fan_in is not None and self.structure not in (None, "constant_fan_in"):
            raise RuleError("LayerSpec: fan_in needs the structure 'constant_fan_in'")
        if self.group_size is not None:
            check_group_size(self.group_size, "LayerSpec")
        if self.block_width is not None:
            check_block_width(self.block_width, "LayerSpec")
            if self.block_width > 1 and self.structure not in (None, "block"):
                raise RuleError(f"LayerSpec: block_width needs the structure 'block', not {self.structure!r}")

    @property
    def names_a_density(self) -> bool:
        """Whether the spec itself says how many weights to keep."""
        return self.sparsity is not None or self.fan_in is not None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, with a version."""
        return {"version": self.VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerSpec":
        """The spec that :meth:`to_dict` described; version 1 had no group size, and version 2 no blocks.

        Raises:
            RuleError: If the version or a field is unknown.
        """
        version = data.get("version")
        later = {"group_size": 2, "block_width": 3}
        known = {field.name for field in fields(cls)}
        if type(version) is int:
            known -= {name for name, since in later.items() if since > version}
        if version not in range(1, cls.VERSION + 1) or not set(data) - {"version"} <= known:
            raise RuleError(
                f"LayerSpec.from_dict: no spec of a version up to {cls.VERSION} with fields {sorted(known)}: "
                f"{dict(data)!r}"
            )
        return cls(**{key: value for key, value in data.items() if key != "version"})


Asked = TypeVar("Asked")


@dataclass(frozen=True, kw_only=True)
class Match(Generic[Asked]):
    """The rule that applies to a weight.

    Attributes:
        key: The rule's key as the user wrote it.
        spec: What it asks; None means dense.
        named: Whether the key names the weight (by name or glob) rather than its module's type.
    """

    key: RuleKey
    spec: Asked
    named: bool


@dataclass(frozen=True, kw_only=True)
class _Rule(Generic[Asked]):
    key: RuleKey
    spec: Asked
    form: Literal["name", "glob", "type"]
    pattern: str = ""


@dataclass(frozen=True, kw_only=True)
class AskedRule:
    """One rule of a call, as a recipe keeps it.

    Attributes:
        key: The rule's key; of a module type, its qualified name.
        is_type: Whether the key is a module type.
        spec: What the rule asks for; None leaves the weights dense.
    """

    key: str
    is_type: bool = False
    spec: LayerSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not isinstance(self.is_type, bool):
            raise RecipeError(f"the recipe's rule {self.key!r:.80} is malformed: a key is a text")
        if not (self.spec is None or isinstance(self.spec, LayerSpec)):
            raise RecipeError(f"the recipe's rule {self.key!r:.80} is malformed: it asks for {self.spec!r:.80}")

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain data.

        Example:
            >>> AskedRule(key="head").to_dict()
            {'key': 'head', 'is_type': False, 'spec': None}
        """
        spec = None if self.spec is None else self.spec.to_dict()
        return {"key": self.key, "is_type": self.is_type, "spec": spec}

    @classmethod
    def from_dict(cls, data: Any) -> "AskedRule":
        """The rule that :meth:`to_dict` described.

        Raises:
            RecipeError: ``data`` is no such description.
            RuleError: What the rule asks for is out of range.
        """
        if not isinstance(data, Mapping) or data.keys() != {"key", "is_type", "spec"}:
            raise RecipeError(f"the recipe's rule {data!r:.80} is malformed")
        spec = data["spec"]
        return cls(key=data["key"], is_type=data["is_type"], spec=None if spec is None else LayerSpec.from_dict(spec))


class Rules(Generic[Asked]):
    """Rules over names, in the user's order.

    Names are those in the model, without or with what torch.compile and data parallelism put in front of them.
    Precedence: the exact name of the parameter or of a module above it (the longest wins), then the first glob that
    matches the parameter's or a module's name, then the first type; ``*`` crosses dots.

    Args:
        rules: From names, globs or module types to what is asked, as the user wrote it.
        read: What a rule asks, of its key and value; raises a RuleError where that is nothing.

    Example:
        >>> rules = Rules({"head": 3, "blocks.*": 4, nn.Linear: 5}, lambda key, value: value)
        >>> [rules.match((name,), nn.Linear(1, 1)).spec for name in ("head.weight", "blocks.0.fc.weight", "fc.weight")]
        [3, 4, 5]
    """

    def __init__(self, rules: Mapping[RuleKey, Any], read: Callable[[object, object], Asked]) -> None:
        self._rules = [self._parse(key, read(key, value)) for key, value in rules.items()]
        self._used: set[RuleKey] = set()

    @staticmethod
    def _parse(key: object, spec: Asked) -> _Rule[Asked]:
        if isinstance(key, type) and issubclass(key, nn.Module):
            return _Rule(key=key, spec=spec, form="type")
        if not isinstance(key, str):
            raise RuleError(f"rule {key!r}: a key is a module or parameter name, a glob, or a module type")
        form: Literal["name", "glob"] = "glob" if any(c in key for c in "*?[") else "name"
        return _Rule(key=key, spec=spec, form=form, pattern=plain(key))

    def match(self, names: Sequence[str], module: nn.Module) -> Match[Asked] | None:
        """The rule for a weight with these names (its own and its aliases) on ``module``, or None."""
        # As they are, and without the prefixes of wrappers.
        scopes = {scope for name in names for scope in _scopes(name)}
        short = {scope for name in names for scope in _scopes(plain(name))}
        exact = [rule for rule in self._rules if rule.form == "name" and (rule.key in scopes or rule.pattern in short)]
        globs = [
            rule
            for rule in self._rules
            if rule.form == "glob"
            and any(
                fnmatch.fnmatchcase(scope, pattern)
                for pattern, found in ((str(rule.key), scopes), (rule.pattern, short))
                for scope in found
            )
        ]
        types = [rule for rule in self._rules if isinstance(rule.key, type) and isinstance(module, rule.key)]
        self._used |= {rule.key for rule in (*exact, *globs, *types)}
        exact.sort(key=lambda rule: -len(rule.pattern))
        for rule in (*exact, *globs, *types):
            return Match(key=rule.key, spec=rule.spec, named=rule.form != "type")
        return None

    def check_all_used(self, available: Sequence[str]) -> None:
        """Raise where a rule matched no weight at all.

        Raises:
            RuleError: Naming the rules, and names that come close or else some weights there are.
        """
        unused = [rule for rule in self._rules if rule.key not in self._used]
        if not unused:
            return
        available = list(map(plain, available))
        scopes = sorted({scope for name in available for scope in _scopes(name)} - {""})
        close = [name for rule in unused for name in difflib.get_close_matches(rule.pattern, scopes, n=3, cutoff=0.5)]
        some = ", ".join(available[:8]) + (", ..." if len(available) > 8 else "")
        keys = ", ".join(repr(rule.key) for rule in unused)
        raise RuleError(
            f"the rule{'s' if len(unused) > 1 else ''} {keys} {'match' if len(unused) > 1 else 'matches'} no weight of "
            + (
                f"the model; names that come close: {', '.join(close)}"
                if close
                else f"the model; it has {some or 'none'}"
            )
        )


class RuleSet(Rules[LayerSpec | None]):
    """The rules of one ``sparsify`` call.

    Example:
        >>> rules = RuleSet({"head": None, "blocks.*": 0.8, nn.Linear: 0.5})
        >>> [rules.match((name,), nn.Linear(1, 1)).key for name in ("head.weight", "blocks.0.fc.weight", "fc.weight")]
        ['head', 'blocks.*', <class 'torch.nn.modules.linear.Linear'>]
    """

    def __init__(self, rules: Mapping[RuleKey, "float | LayerSpec | None"] | None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise RuleError(
                f"rules must be a mapping from names, globs or module types to specs, got {type(rules).__name__}"
            )
        super().__init__(rules or {}, _spec)

    def specs(self) -> tuple[LayerSpec, ...]:
        """What the rules ask for, of those that leave nothing dense.

        Example:
            >>> [spec.sparsity for spec in RuleSet({"head": None, "blocks.*": 0.8}).specs()]
            [0.8]
        """
        return tuple(rule.spec for rule in self._rules if rule.spec is not None)

    def asked(self) -> tuple[AskedRule, ...]:
        """The rules as a recipe keeps them, in the user's order.

        Example:
            >>> RuleSet({nn.Linear: 0.5}).asked()[0].key
            'torch.nn.modules.linear.Linear'
        """
        return tuple(
            AskedRule(key=rule.key, spec=rule.spec)
            if isinstance(rule.key, str)
            else AskedRule(key=f"{rule.key.__module__}.{rule.key.__qualname__}", is_type=True, spec=rule.spec)
            for rule in self._rules
        )


def _spec(key: object, value: object) -> LayerSpec | None:
    if value is None or isinstance(value, LayerSpec):
        return value
    return LayerSpec(sparsity=check_sparsity(value, f"rule {key!r}"))


def _scopes(name: str) -> list[str]:
    """A parameter's name and those of all modules above it, the root's "" included."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]
