"""What a trainer's saved state must look like, and whether it belongs to the model at hand.

Owns the checks that come before any of a state is used. It must not know trainers.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks.records import SparseWeight, plain, sparse_weights

STATE_VERSION = 1
_AS_SAVED = "build the model as that of the saved run, and sparsify it with the same arguments"

_log = logging.getLogger(__name__)


def layout(model: nn.Module, weights: Iterable[SparseWeight] | None = None) -> dict[str, dict[str, Any]]:
    """What must agree between a saved run and the one that resumes it.

    Rows by themselves are not mentioned: runs that were saved before rows could share their inputs go on.

    Args:
        model: A sparsified model.
        weights: Its masked weights, where they have been looked up.
    """
    return {
        handle.key: {
            "shape": list(handle.record.site.shape),
            "structure": handle.record.structure,
            "budgets": list(handle.record.budgets),
            **({"group_size": handle.record.group_size} if handle.record.group_size > 1 else {}),
            **({"block_width": handle.record.block_width} if handle.record.block_width > 1 else {}),
        }
        for handle in (sparse_weights(model) if weights is None else weights)
    }


def check_state(state: Any, method: str) -> None:
    """Require what ``state_dict`` writes, whole, before any of it is used."""
    if not isinstance(state, dict):
        raise TrainerError(f"a trainer's state is a dict, as state_dict() gives it, not {type(state).__name__}")
    saved, version = state.get("method"), state.get("version")
    same = isinstance(saved, str) and saved == method
    if not same or not isinstance(version, int) or version != STATE_VERSION:
        raise TrainerError(
            f"this is no state of {method} (version {STATE_VERSION}) but of {saved} (version {version}): resume with "
            "the method that was saved"
        )

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    weights = state.get("weights")
    sound = {
        "steps": is_count(state.get("steps")),
        "last_update": "last_update" in state and (state["last_update"] is None or is_count(state["last_update"])),
        "update_due": isinstance(state.get("update_due"), bool),
        "threads": is_count(state.get("threads", 0)),
        "weights": isinstance(weights, dict) and all(isinstance(value, dict) for value in weights.values()),
        "captured": _is_table(state.get("captured"), (str, str, Tensor)),
        "gradients": _is_table(state.get("gradients", ()), (str, Tensor)),
        "step_counts": _is_table(state.get("step_counts", ()), (str, Tensor, Tensor, Tensor)),
    }
    if damaged := [name for name, is_sound in sound.items() if not is_sound]:
        raise TrainerError(f"the trainer's state is damaged at {', '.join(damaged)}; load another checkpoint")


def note_threads(state: dict[str, Any], model: nn.Module) -> None:
    """Log a line where the saved run computed with another number of threads than this process does.

    Sums are then rounded in another order: the resumed run is as good as the saved one, and not equal to it bit for
    bit. A model on another device than the CPU does not depend on it.

    Example:
        >>> note_threads({"threads": torch.get_num_threads()}, nn.Linear(3, 2))
    """
    saved, here = state.get("threads"), torch.get_num_threads()
    if saved in (None, here) or all(handle.weight.device.type != "cpu" for handle in sparse_weights(model)):
        return
    _log.warning(
        "the run was saved with %d threads and goes on with %d: sums are rounded in another order, so that it will not "
        "end with the same weights bit for bit; call torch.set_num_threads(%d) before training where it must",
        *(saved, here, saved),
    )


def _is_table(value: object, row: tuple[type, ...]) -> bool:
    """Whether ``value`` is a tuple of tuples of the types in ``row``, the first columns of which differ."""
    return (
        isinstance(value, tuple | list)
        and all(isinstance(entry, tuple | list) and len(entry) == len(row) for entry in value)
        and all(isinstance(item, kind) for entry in value for item, kind in zip(entry, row, strict=True))
        and len({tuple(entry[:-1]) for entry in value}) == len(value)
    )


def check_tensors(state: dict[str, Any], model: nn.Module) -> None:
    """Require that a sound state's gradients are those of the model's parameters: known names, shapes and dtypes.

    Raises:
        TrainerError: Naming those that are not.

    Example:
        >>> import torch
        >>> check_tensors({"captured": (), "gradients": (("weight", torch.ones(2, 3)),)}, nn.Linear(3, 2))
    """
    parameters = {plain(name): parameter for name, parameter in model.named_parameters()}
    masked = {handle.key: handle.weight for handle in sparse_weights(model)}
    unknown = [name for name, grad in state.get("gradients", ()) if not _fits(grad, parameters.get(name))]
    unknown += [
        f"{name} ({part})"
        for name, part, tensor in state["captured"]
        if part not in ("total", "dense") or not _fits(tensor, masked.get(name))
    ]
    if unknown:
        raise TrainerError(f"the state holds gradients that fit no parameter of the model: {', '.join(unknown[:5])}")
    counted = state.get("step_counts", ())
    odd = [row[0] for row in counted if not _are_counts(row, masked.get(row[0]))]
    if odd or len({row[0] for row in counted}) != len(counted):
        raise TrainerError(
            f"the state holds counts of steps that fit no weight of the model: {', '.join(odd[:5]) or 'one twice'}"
        )


def _fits(grad: Tensor, parameter: nn.Parameter | None) -> bool:
    return parameter is not None and grad.shape == parameter.shape and grad.dtype == parameter.dtype


def _are_counts(row: tuple[str, Tensor, Tensor, Tensor], weight: nn.Parameter | None) -> bool:
    """Whether a row says of weights, in order, when they grew, and what their products of momenta are."""
    _, positions, born, products = row
    if weight is None or positions.dtype != torch.int64 or positions.dim() != 1:
        return False
    if not all(one.is_floating_point() and one.shape == positions.shape for one in (born, products)):
        return False
    bounded = bool((positions.diff() > 0).all()) and bool(((positions >= 0) & (positions < weight.numel())).all())
    return bounded and bool((born.isfinite() & (born > 0)).all()) and bool(products.isfinite().all())


def check_layout(saved: dict[str, dict[str, Any]], live: dict[str, dict[str, Any]]) -> None:
    """Require that a saved run and the model at hand mask the same weights in the same way.

    Raises:
        TrainerError: They mask different weights.
        StructureError: One of them has another shape, structure, budget or group size.

    Example:
        >>> check_layout({}, layout(nn.Linear(3, 2)))
    """
    if saved.keys() != live.keys():
        differing = sorted(saved.keys() ^ live.keys())
        raise TrainerError(
            "the state is of another model, or of one that was sparsified in another way: only one of the two masks "
            f"{', '.join(differing[:5])}: {_AS_SAVED}"
        )
    if others := [name for name in live if saved[name] != live[name]]:
        # One layer of another size moves the budgets of all: it is the one to name.
        name = min(others, key=lambda name: saved[name].get("shape") == live[name]["shape"])
        raise StructureError(f"{name}: saved with {saved[name]}, but the model has {live[name]}: {_AS_SAVED}")
