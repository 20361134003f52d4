"""What a trainer's saved state must look like, and whether it belongs to the model at hand.

Owns the checks that come before any of a state is used. It must not know trainers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks.records import sparse_weights

STATE_VERSION = 1


def layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What must agree between a saved run and the one that resumes it."""
    return {
        handle.record.site.fqn: {
            "shape": list(handle.record.site.shape),
            "structure": handle.record.structure,
            "budgets": list(handle.record.budgets),
        }
        for handle in sparse_weights(model)
    }


def check_state(state: Any, method: str) -> None:
    """Require what ``state_dict`` writes, whole, before any of it is used."""
    if not isinstance(state, dict):
        raise TrainerError(f"a trainer's state is a dict, as state_dict() gives it, not {type(state).__name__}")
    if state.get("version") != STATE_VERSION or state.get("method") != method:
        raise TrainerError(
            f"this is no state of {method} (version {STATE_VERSION}) but of {state.get('method')} "
            f"(version {state.get('version')}): resume with the method that was saved"
        )

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    weights, captured = state.get("weights"), state.get("captured")
    sound = {
        "steps": is_count(state.get("steps")),
        "last_update": "last_update" in state and (state["last_update"] is None or is_count(state["last_update"])),
        "update_due": isinstance(state.get("update_due"), bool),
        "weights": isinstance(weights, dict),
        "captured": isinstance(weights, dict)
        and isinstance(captured, dict)
        and all(_fits(tensors, weights.get(name)) for name, tensors in captured.items()),
        "gradients": isinstance(state.get("gradients", {}), dict)
        and all(isinstance(grad, Tensor) for grad in state.get("gradients", {}).values()),
    }
    if damaged := [name for name, is_sound in sound.items() if not is_sound]:
        raise TrainerError(f"the trainer's state is damaged at {', '.join(damaged)}; load another checkpoint")


def _fits(tensors: object, layout: object) -> bool:
    """Whether captured gradients of a weight are tensors of its shape."""
    return (
        isinstance(tensors, dict)
        and isinstance(layout, dict)
        and set(tensors) <= {"total", "dense"}
        and all(isinstance(tensor, Tensor) and list(tensor.shape) == layout.get("shape") for tensor in tensors.values())
    )


def check_layout(saved: dict[str, dict[str, Any]], live: dict[str, dict[str, Any]]) -> None:
    """Require that a saved run and the model at hand mask the same weights in the same way.

    Raises:
        TrainerError: They mask different weights.
        StructureError: One of them has another shape, structure or budget.

    Example:
        >>> check_layout({}, layout(nn.Linear(3, 2)))
    """
    if saved.keys() != live.keys():
        differing = sorted(saved.keys() ^ live.keys())
        raise TrainerError(f"the state is of another model: only one of the two masks {', '.join(differing[:5])}")
    for name, layout in live.items():
        if saved[name] != layout:
            raise StructureError(
                f"{name}: saved with {saved[name]}, but the model has {layout}: sparsify it with the arguments of the "
                "saved run"
            )


def plain(name: str) -> str:
    """A parameter's name without the prefixes of torch.compile and data parallelism."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def shape(parameter: nn.Parameter | None) -> torch.Size | None:
    """A parameter's shape; None where there is none.

    Example:
        >>> shape(nn.Linear(3, 2).weight)
        torch.Size([2, 3])
    """
    return None if parameter is None else parameter.shape
