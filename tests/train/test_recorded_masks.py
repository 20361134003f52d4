"""Masks of rows by themselves are, to the bit, those that the rules found before rows could share their inputs.

The digests were recorded at commit 32ec0a2. Values are made of whole numbers: no processor rounds them otherwise.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srigl_fx.masks.records import Structure
from srigl_fx.masks.structures import MaskInit, initial_mask
from srigl_fx.train.updates import drop_and_grow, gmp_update, rigl_update, set_update, snfs_update, srigl_update

ROWS, COLUMNS, BUDGET, UPDATES = 23, 41, 230, 12


def numbers(seed: int) -> Tensor:
    """Multiples of 1/64 in (-8, 8), with ties and zeros among them."""
    flat = torch.arange(1, ROWS * COLUMNS + 1)
    return (((flat * 2654435761 + seed * 40503) >> 7) % 1009 - 504).float().reshape(ROWS, COLUMNS) / 64


def first(structure: Structure, init: MaskInit) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return initial_mask(numbers(0), structure=structure, budget=BUDGET, init=init, generator=draw)


def chain(structure: Structure, update: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> list[Tensor]:
    """The masks of several updates, between which the weights change."""
    masks = [first(structure, "random")]
    weight = numbers(1) * masks[0]
    for step in range(1, UPDATES + 1):
        masks.append(update(weight, numbers(2 * step), masks[-1], step))
        weight = (weight + numbers(2 * step + 1)) * masks[-1]
    return masks


def srigl(**options: Any) -> list[Tensor]:
    def update(weight: Tensor, grad: Tensor, mask: Tensor, step: int) -> Tensor:
        frozen = ~mask.any(dim=1) if options.get("permanent") else None
        own = {name: value for name, value in options.items() if name != "permanent"}
        return srigl_update(weight, grad, mask, budget=BUDGET, drop_fraction=0.3, frozen_rows=frozen, **own)

    return chain("constant_fan_in", update)


def drawn(weight: Tensor, grad: Tensor, mask: Tensor, step: int) -> Tensor:
    return set_update(weight, mask, drop_fraction=0.3, generator=torch.Generator().manual_seed(step))


def pruned(structure: Structure) -> list[Tensor]:
    mask, masks = torch.ones(ROWS, COLUMNS, dtype=torch.bool), []
    for count in (700, 500, BUDGET):
        mask = gmp_update(numbers(3) * mask, mask, count=count, structure=structure)
        masks.append(mask)
    return masks


def per_row(weight: Tensor, grad: Tensor, mask: Tensor, step: int) -> Tensor:
    return drop_and_grow(weight, grad, mask, budget=BUDGET, drop_fraction=0.3, structure="constant_fan_in")


def anywhere(update: Callable[..., Tensor]) -> list[Tensor]:
    return chain("unstructured", lambda weight, grad, mask, step: update(weight, grad, mask, drop_fraction=0.3))


RUNS: dict[str, tuple[Callable[[], list[Tensor]], str]] = {
    "first by magnitude": (
        lambda: [first("constant_fan_in", "magnitude"), first("unstructured", "magnitude")],
        "7e9fedeb3febfbb6",
    ),
    "first at random": (
        lambda: [first("constant_fan_in", "random"), first("unstructured", "random")],
        "80e7336e788735e5",
    ),
    "SRigL": (lambda: srigl(), "8c9428eb47c12c74"),
    "SRigL with ablation": (lambda: srigl(ablation=0.9), "ccb439b3e92b3689"),
    "SRigL with permanent ablation": (lambda: srigl(ablation=0.9, permanent=True, min_neurons=9), "997e43c958375cfb"),
    "RigL": (lambda: anywhere(rigl_update), "22aab24fdbd3f060"),
    "RigL per row": (lambda: chain("constant_fan_in", per_row), "8c9428eb47c12c74"),
    "SNFS": (lambda: anywhere(snfs_update), "22aab24fdbd3f060"),
    "SET": (lambda: chain("unstructured", drawn), "e16e8258e13ad6e8"),
    "GMP": (lambda: pruned("unstructured"), "44e4a3aa66a9734a"),
    "GMP per row": (lambda: pruned("constant_fan_in"), "29ccf70f9031ae1b"),
}


@pytest.mark.parametrize("run", RUNS)
def test_masks_are_what_they_were(run: str) -> None:
    masks, recorded = RUNS[run][0](), RUNS[run][1]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
    assert hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest()[:16] == recorded
