"""Each mask structure of the literature, lowered: what is kept is found in the condensed weight, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.masks.records import Structure, WeightRecord, WeightSite, set_records

ROWS, INPUTS = 24, 32


def blocks() -> Tensor:
    """Blocks of 4 by 4, as many of them in each run of rows."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(ROWS // 4, INPUTS // 4, generator=generator).argsort(dim=1) < 3
    return chosen.repeat_interleave(4, 0).repeat_interleave(4, 1)


def uneven_blocks() -> Tensor:
    """Blocks of 4 by 4 anywhere, none in some rows."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(ROWS // 4, INPUTS // 4, generator=generator) < 0.4
    chosen[2] = False
    return chosen.repeat_interleave(4, 0).repeat_interleave(4, 1)


def two_of_four() -> Tensor:
    """2:4: of four neighbouring inputs each row keeps two."""
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(ROWS, INPUTS // 4, 4, generator=generator).argsort(dim=2) < 2).reshape(ROWS, INPUTS)


def diagonals() -> Tensor:
    """DynaDiag: some of the cyclic diagonals, (i, j) = (q, (p + q) mod F) for the rows q."""
    mask = torch.zeros(ROWS, INPUTS, dtype=torch.bool)
    for diagonal in (0, 3, 17, 30):
        mask[torch.arange(ROWS), (torch.arange(ROWS) + diagonal) % INPUTS] = True
    return mask


def masked(mask: Tensor, structure: Structure, **more: Any) -> nn.Sequential:
    """One layer with this mask."""
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(INPUTS, ROWS)), sparsity=0.5, structure="unstructured")
    site = WeightSite(owner="0", attr="weight", kind="linear", shape=(ROWS, INPUTS))
    record = WeightRecord(site=site, structure=structure, budgets=(int(mask.sum()),), ablation=(None,), **more)
    set_records(model[0], {"weight": record})
    with torch.no_grad():
        model.get_buffer("0.weight_mask").copy_(mask)
        model.get_parameter("0.weight").copy_(torch.randn(ROWS, INPUTS) * mask)
    sx.verify(model)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "structure", "more"),
    [
        (blocks, "constant_fan_in", {"group_size": 4}),  # a shared fan-in of neighbouring inputs
        (blocks, "block", {"group_size": 4, "block_width": 4}),
        (uneven_blocks, "block", {"group_size": 4, "block_width": 4}),
        (two_of_four, "constant_fan_in", {}),
        (diagonals, "constant_fan_in", {}),
    ],
)
def test_lowered_exactly(make: Callable[[], Tensor], structure: Structure, more: dict[str, Any]) -> None:
    mask = make()
    model, x = masked(mask, structure, **more), torch.randn(7, INPUTS)
    lowered = sx.lower(model, (x,), min_speedup=0)
    (layer,) = lowered.report.layers
    assert (layer.decision, layer.reason) == ("condensed", "")
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)
    # Of one input at a time a sum has one term, and shows the weight to the bit.
    weight, bias = (model.get_parameter(f"0.{name}").detach() for name in ("weight", "bias"))
    with torch.no_grad():
        assert torch.equal(lowered(torch.eye(INPUTS)), weight.T + bias)
    # What is stored is what is kept; the last index of a row is repeated where it has fewer weights than others.
    buffers = dict(lowered.named_buffers())
    kept = 0
    for name in (name for name in buffers if "indices" in name):
        indices, active = buffers[name].int(), buffers[name.replace("indices", "active")]
        rows = indices if active.dim() == 1 else indices[active[1].long()]  # rows with one mask store it once
        kept += sum(1 + int((one[1:] != one[:-1]).sum()) for one in rows)
    assert kept == int(mask.sum())


def test_trained_blocks_are_lowered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 12))
    sx.sparsify(randomise(model), sparsity=0.7, distribution="uniform", structure="block", group_size=4, block_width=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = sx.RigL(model, optimizer, total_steps=20, update_every=2, drop_fraction=0.5)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 4, 4, 4)).square().sum().backward()
        optimizer.step()
    assert trainer.last_update == 6
    trainer.detach()
    x = torch.randn(3, 4, 4, 4)
    lowered = sx.lower(model.eval(), (x,), min_speedup=0)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed", "condensed"]
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-4, atol=1e-5)
