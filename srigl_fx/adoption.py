"""Masks for a model that somebody else made sparse: ``adopt``.

Owns the verb: discover -> adopt zeros -> insert masks, and how masks of
``torch.nn.utils.prune`` are made permanent before it. It must not know how a mask is decided.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from srigl_fx.compatibility import noted
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.presence import pruned_by_torch
from srigl_fx.masks.records import all_records
from srigl_fx.passes.adopt_zeros import AdoptZeros
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.insert_masks import InsertMasks
from srigl_fx.recipes import asked_for
from srigl_fx.specs import RuleSet

Model = TypeVar("Model", bound=nn.Module)


@noted
def adopt(model: Model, *, min_sparsity: float = 0.5, example_inputs: Any = None) -> Model:
    """Take masks from the zeros of a model that is sparse already, in place, and return the same object.

    It may have been pruned by anything that leaves zeros: ``torch.nn.utils.prune`` (whose masks are made permanent
    first), Wanda, SparseML, a script, or a checkpoint of such a model. The outputs do not change. Afterwards the model
    is like one that :func:`srigl_fx.sparsify` made: :func:`srigl_fx.summary` shows each weight, :func:`srigl_fx.lower`
    and :func:`srigl_fx.export_onnx` condense it, and a trainer keeps its zeros. Rows may keep different numbers of
    weights.

    Args:
        model: Any module, without masks of ours.
        min_sparsity: A weight gets a mask if at least this fraction of it is zero, in (0, 1).
        example_inputs: A tuple of inputs, or ``(args, kwargs)``; they show how weights are used where the model's code
            does not, as for :func:`srigl_fx.sparsify`.

    Raises:
        SparsifyError: No weight has so many zeros (the message says how many they have), the model has masks, is
            wrapped for several processes, or ``min_sparsity`` is out of range.

    In each case the model is as it was.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> _ = prune.l1_unstructured(model[0], "weight", amount=0.9)
        >>> adopt(model)[0]
        SparseLinear(in_features=64, out_features=32, bias=True, fan_in=11/64, active=32/32)
    """
    from srigl_fx.train import distributed

    if not isinstance(model, nn.Module):
        raise SparsifyError(f"adopt takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(min_sparsity, bool) or not isinstance(min_sparsity, int | float) or not 0 < min_sparsity < 1:
        raise SparsifyError(f"min_sparsity must lie between 0 and 1, such as 0.5, got {min_sparsity!r}")
    if done := [fqn for fqn, _, record in all_records(model) if record.sparse]:
        raise SparsifyError(f"the model has masks already ({done[0]!r} has one); there is nothing to adopt")
    distributed.check_unwrapped(model, "adopt")
    names = [(module, name) for module in model.modules() for name in pruned_by_torch(module).values()]
    before = [(module, name, _Pruned(module, name)) for module, name in names]
    try:
        for module, name, _ in before:
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        draft = run((Discover(example_inputs), AdoptZeros(min_sparsity=float(min_sparsity))), Draft(model)).subject
        whole = sum(mask.numel() for mask in draft.masks.values())
        removed = whole - sum(int(mask.sum()) for mask in draft.masks.values())
        draft.asked = asked_for(
            sparsity=removed / whole,
            distribution="uniform",
            rules=RuleSet(None),
            structure="unstructured",
            group_size=1,
            mask_init="magnitude",
            weight_init="keep",
            strict=False,
            seed=0,
            filtered=False,
        )
        run((InsertMasks(),), draft)
    except BaseException:
        for _, _, state in reversed(before):
            state.restore()
        raise
    distributed.ignore_masks(model)
    return model


class _Pruned:
    """What ``prune.remove`` changes of a module, to be put back."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._attribute = module.__dict__.get(name)
        self._kept: dict[str, Mapping[Any, Any]] = {
            kind: dict(getattr(module, kind)) for kind in ("_parameters", "_buffers", "_forward_pre_hooks")
        }
        original: Tensor = getattr(module, f"{name}_orig")
        self._original, self._values = original, original.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        for kind, kept in self._kept.items():
            live = getattr(self._module, kind)
            live.clear()
            live.update(kept)
        self._original.data = self._values
        if self._attribute is not None:
            self._module.__dict__[self._name] = self._attribute
