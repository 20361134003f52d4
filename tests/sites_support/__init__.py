"""What the tests of discovery share: discovery by name, an oracle for matrix views, updates on what was found."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.masks.records import WeightSite
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft, Finding


def discover(model: nn.Module, example_inputs: object = None) -> dict[str, Finding]:
    """What discovery finds, by name."""
    return {f.site.fqn: f for f in run((Discover(example_inputs),), Draft(model)).subject.findings}


class Functional(nn.Module):
    """Owns one parameter and uses it as the test says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any], shape: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        """Whatever ``use`` makes of the input and the parameter."""
        return self.use(x, self.w)


def assert_rows_are_neurons(site: WeightSite, weight: nn.Parameter, output: Tensor) -> None:
    """Each output that depends on the weight depends on one row of its matrix view, and on all of that row."""
    met = set()
    for value in output.flatten():
        (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
        touched = site.to_matrix(gradient) != 0
        rows = touched.any(1).nonzero().flatten().tolist()
        assert len(rows) == 1, rows
        assert touched[rows[0]].all()
        met.add(rows[0])
    assert met == set(range(site.matrix_shape[0]))


def assert_blocks_tile(site: WeightSite) -> None:
    """The blocks cover the rows of the matrix view, one after the other."""
    borders = [0, *(block.stop for block in site.blocks)]
    assert [block.start for block in site.blocks] == borders[:-1]
    assert borders[-1] == site.matrix_shape[0]


def train_some(model: nn.Module, *args: Any, updates: int = 2, sparsity: float = 0.5, **options: Any) -> list[str]:
    """Sparsify, train through some SRigL updates with ablation, and verify; the names of the masked weights.

    Along the way: no name changes, every step keeps the invariants, some mask changes, and the state loads again.
    """
    names = list(model.state_dict())
    sx.sparsify(model, sparsity=sparsity, distribution="uniform", **options)
    masks = dict(sx.masks.named_masks(model))
    assert [name for name in model.state_dict() if not name.endswith("_mask") or name in names] == names
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = sx.SRigL(model, optimizer, total_steps=1000, update_every=2, ablation=0.3, protect="none")
    before = {name: mask.clone() for name, mask in masks.items()}
    for _ in range(2 * updates + 1):
        optimizer.zero_grad()
        out = model(*args)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        loss = torch.stack([leaf.square().mean() for leaf in leaves]).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        sx.masks.verify(model, optimizer)
    after = dict(sx.masks.named_masks(model))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trainer.detach()
    model.load_state_dict(model.state_dict())
    sx.masks.verify(model)
    return list(masks)
