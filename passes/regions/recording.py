"""What every sub-module was called with in one run of a model.

Owns :class:`ModuleCall` and the recording; it must not know what the calls are compared for. Nothing of the model
changes.

1. Each module gets two hooks: one before its forward, which keeps a copy of the inputs, and one behind it, which looks
   at the outputs. Modules compiled by TorchScript take no hooks.
2. Of calls with the same structure, types, sizes and constants, the first is kept.
3. Hooks nest as calls do, so the call that a hook behind a forward belongs to is the last open one of its module; those
   opened since raised an error that somebody caught.
4. Only the thread that records counts.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.passes.example_inputs import foreign_types
from srigl_fx.passes.model_runs import run_steps


@dataclass
class ModuleCall:
    """One call of a module; others with the same structure, types and sizes are not kept.

    Attributes:
        leaves: The flat inputs; tensors are copies.
        spec: The structure of (args, kwargs).
        problem: What it takes or returns that a graph cannot, in words; "" where there is no such thing.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    problem: str = ""

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as (args, kwargs)."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs


@dataclass
class Recording:
    """One run of a model.

    Attributes:
        output: What the model returned.
        written: The names of the buffers it wrote into.
        changed: The names of other attributes that it changed.
        calls: The distinct calls of each module that was called, in order.
    """

    output: Any = None
    written: frozenset[str] = frozenset()
    changed: tuple[str, ...] = ()
    calls: dict[nn.Module, list[ModuleCall]] = field(default_factory=dict)


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Run ``model`` once and keep what each of its modules was called with.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> [call.leaves[0].shape for call in record(model, (torch.ones(4, 3),), {}).calls[model[1]]]
        [torch.Size([4, 2])]
    """
    recording = Recording()
    known: dict[nn.Module, dict[Any, ModuleCall]] = {}
    running: list[tuple[nn.Module, ModuleCall]] = []
    thread = threading.get_ident()  # other threads may be using the model

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:  # rule 4
            return
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (repr(spec), *map(signature, leaves))
        calls = known.setdefault(module, {})
        if key not in calls:  # rule 2; copies, since the forward may write into its inputs
            copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            calls[key] = ModuleCall(copies, spec, foreign_types(leaves, None))
        running.append((module, calls[key]))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while running and threading.get_ident() == thread:
            called, call = running.pop()  # rule 3
            if called is module:
                call.problem = call.problem or foreign_types((), output)
                return

    handles = []
    try:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                # Before and behind all other hooks: inputs and outputs are those that the caller sees.
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(after))
        run = run_steps(model, args, kwargs, 1)[0]
        recording.output, recording.written, recording.changed = run.output, frozenset(run.written), run.changed
    finally:
        for handle in handles:
            handle.remove()
    recording.calls = {module: list(calls.values()) for module, calls in known.items()}
    return recording


def signature(leaf: Any) -> Any:
    """What must be the same for two inputs to count as one: type and sizes of a tensor, a constant itself."""
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.dtype, () if leaf.is_nested else tuple(leaf.shape)
    return type(leaf), leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)
