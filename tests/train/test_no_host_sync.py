"""An ordinary step never makes the host wait for a device: no operation of ours reads a value back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import mlp

from srigl_fx import SRigL

# Operations that return a number, or a tensor whose shape depends on the values.
READS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the names of all operations, those of hooks and of the backward pass among them, and of those that wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all: list[str] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.all.append(name)
        by_mask = "index" in name and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in args
            if isinstance(argument, list | tuple)
            for index in argument
        )
        if name in READS or by_mask:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "RMSprop foreach": lambda parameters: torch.optim.RMSprop(parameters, foreach=True),
}


def step(model: nn.Module, optimizer: Optimizer, *, clip: bool) -> None:
    optimizer.zero_grad()
    for _ in range(2):
        model(torch.randn(8, 24)).square().mean().backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
def test_an_ordinary_step_waits_for_nothing(name: str, clip: bool) -> None:
    seen: dict[bool, list[str]] = {}
    total: dict[bool, int] = {}
    for trained in (False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = OPTIMIZERS[name](model.parameters())
        trainer = SRigL(model, optimizer, total_steps=1000, update_every=100) if trained else None
        step(model, optimizer, clip=clip)
        with Operations() as operations:
            step(model, optimizer, clip=clip)
        seen[trained], total[trained] = operations.waiting, len(operations.all)
        assert trainer is None or trainer.last_update is None
    assert total[True] > total[False], "the hooks' operations were not seen"
    # Some optimizers read their own step counter, which is on the CPU: no less without us.
    assert seen[True] == seen[False]
    if name == "SGD":
        assert seen[True] == []


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Adafactor"])
def test_counting_the_steps_of_young_weights_waits_for_nothing(name: str) -> None:
    seen = {}
    for step_count in ("tensor", "weight"):
        torch.manual_seed(0)
        model = mlp()
        optimizer = OPTIMIZERS[name](model.parameters())
        method: Any = SRigL
        trainer = method(model, optimizer, total_steps=1000, update_every=2, step_count=step_count)
        for _ in range(2):
            step(model, optimizer, clip=False)
        assert trainer.last_update == 2
        with Operations() as operations:
            step(model, optimizer, clip=False)
        seen[step_count] = operations.waiting
    assert seen["weight"] == seen["tensor"]


def test_a_topology_update_is_seen_to_wait() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    trainer = SRigL(model, optimizer, total_steps=1000, update_every=2)
    step(model, optimizer, clip=False)
    with Operations() as operations:
        step(model, optimizer, clip=False)
    assert trainer.last_update == 2
    assert operations.waiting
