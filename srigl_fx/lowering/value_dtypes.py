"""What ``value_dtype`` asks for: one dtype for all weights, rules over names, or a function.

Owns what may be asked, and the dtype of each weight that comes of it. It must not know what a dtype means.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from srigl_fx.errors import LoweringError, RuleError
from srigl_fx.masks.records import all_records
from srigl_fx.runtime.value_types import NAMES, choice
from srigl_fx.specs import RuleKey, Rules

ValueDtypes = torch.dtype | Mapping[RuleKey, torch.dtype] | Callable[[str, nn.Module], torch.dtype]


def value_dtypes(model: nn.Module, asked: ValueDtypes) -> dict[str, torch.dtype]:
    """The dtype of the values of each masked weight, by the weight's name.

    Args:
        model: A model with masks.
        asked: One dtype; or rules from names, globs or module types to dtypes, read as those of
            :func:`srigl_fx.sparsify`; or a function that is asked with a module's name and the module. A weight that no
            rule matches is stored in float32.

    Raises:
        LoweringError: No such dtype, or a function that gives none.
        RuleError: A rule asks for no dtype, or matches no weight of the model, masked or not.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10)), distribution="uniform")
        >>> value_dtypes(model, {nn.Linear: torch.int8, "1": torch.float32})
        {'0.weight': torch.int8, '1.weight': torch.float32}
        >>> value_dtypes(model, lambda name, module: torch.int8 if module.in_features > 32 else torch.float32)
        {'0.weight': torch.int8, '1.weight': torch.float32}
    """
    records = [(fqn, owner, record) for fqn, owner, record in all_records(model)]
    masked = [(fqn, owner, record) for fqn, owner, record in records if record.sparse]
    if isinstance(asked, torch.dtype) and _is_dtype(asked):
        return dict.fromkeys((fqn for fqn, _, _ in masked), asked)
    if isinstance(asked, Mapping):
        rules = Rules(asked, _dtype)
        found = {fqn: rules.match((fqn, *record.site.aliases), owner) for fqn, owner, record in records}
        rules.check_all_used([fqn for fqn, _, _ in records])
        matches = ((fqn, found[fqn]) for fqn, _, _ in masked)
        return {fqn: torch.float32 if match is None else match.spec for fqn, match in matches}
    if callable(asked) and not isinstance(asked, torch.dtype):
        return {fqn: _answer(asked, fqn.rpartition(".")[0], owner) for fqn, owner, _ in masked}
    raise LoweringError(
        f"value_dtype must be {choice(prefix='torch.')}, a mapping from names, globs or module types to these, or a "
        f"function of a module's name and the module, not {asked!r}"
    )


def _is_dtype(asked: object) -> bool:
    return isinstance(asked, torch.dtype) and str(asked).removeprefix("torch.") in NAMES


def _dtype(key: object, value: object) -> torch.dtype:
    if not isinstance(value, torch.dtype) or not _is_dtype(value):
        raise RuleError(f"rule {key!r}: a value_dtype is {choice(prefix='torch.')}, not {value!r}")
    return value


def _answer(asked: Callable[[str, nn.Module], torch.dtype], name: str, owner: nn.Module) -> torch.dtype:
    try:
        answer = asked(name, owner)
    except Exception as error:  # the user's own code: any type
        raise LoweringError(
            f"value_dtype failed for {name!r} ({type(error).__name__}: {error}); it takes a module's name and the "
            "module, and returns a dtype"
        ) from error
    if not _is_dtype(answer):
        raise LoweringError(
            f"value_dtype gives {answer!r} for {name or 'the model'} ({type(owner).__name__}): it must give "
            f"{choice(prefix='torch.')}"
        )
    return answer
