"""A small net of most kinds of weight trains; after every update all that must hold is checked."""

import math

import pytest
import torch
from torch import Tensor
from train_support import SmallNet, batches, loss_of

from srigl_fx import sparsify
from srigl_fx.masks import verify
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.train import SRigL
from srigl_fx.train.schedules import cosine_drop_fraction

STEPS, EVERY, STOP = 200, 10, 0.75


def _matrix(handle: SparseWeight, tensor: Tensor) -> Tensor:
    return handle.record.site.to_matrix(tensor.detach()).clone()


def _check_rows(handle: SparseWeight, mask: Tensor, protected: bool) -> None:
    site = handle.record.site
    for block, budget in zip(site.blocks, handle.record.budgets, strict=True):
        counts = mask[block.start : block.stop].sum(1)
        fan_in, active = mask.shape[1], int((counts > 0).sum())
        assert set(counts.tolist()) <= {0, min(fan_in, budget // active)}
        assert int(counts.sum()) <= budget
        assert active >= math.ceil(budget / fan_in)
        if protected or not block.ablatable:
            assert active == block.rows


@pytest.mark.long
@pytest.mark.parametrize(
    ("ablation", "permanent", "optimizer_name"),
    [(None, False, "AdamW"), (0.3, False, "SGD"), (0.9, False, "AdamW"), (0.9, True, "RMSprop")],
)
def test_invariants_hold_throughout(ablation: float | None, permanent: bool, optimizer_name: str) -> None:
    torch.manual_seed(1)
    model = sparsify(SmallNet(), sparsity=0.8, mask_init="random", weight_init="kaiming", seed=3)
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=3e-3, weight_decay=0.01)
    trainer = SRigL(
        model,
        optimizer,
        total_steps=STEPS,
        update_every=EVERY,
        stop_at=STOP,
        ablation=ablation,
        permanent_ablation=permanent,
        drop_fraction=0.4,
        protect="output",
        auto=False,
    )
    assert set(trainer.protected) == {"head.weight"}
    verify(model, optimizer)
    handles = sparse_weights(model)
    assert len(handles) >= 6
    losses, updates, regrown, ablated = [], [], 0, 0
    for t, x in enumerate(batches(STEPS, (8, 3, 4, 4)), start=1):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        losses.append(loss.item())
        for handle in handles:
            assert handle.weight.grad is not None
            assert not handle.weight.grad[~handle.mask].any()
        optimizer.step()
        assert trainer.steps == t
        before = {handle.fqn: (_matrix(handle, handle.mask), _matrix(handle, handle.weight)) for handle in handles}
        states = {handle.fqn: dict(optimizer.state[handle.weight]) for handle in handles}
        kept_states = {
            (name, key): value.clone()
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.ndim
        }
        changed = trainer.step()
        verify(model, optimizer)
        expected_update = t % EVERY == 0 and t < STOP * STEPS
        assert changed <= expected_update
        if not expected_update:
            assert all(torch.equal(_matrix(handle, handle.mask), before[handle.fqn][0]) for handle in handles)
            continue
        updates.append(changed)
        drop = cosine_drop_fraction(t, initial=0.4, end=int(STOP * STEPS))
        for handle in handles:
            old, values = before[handle.fqn]
            new, after = _matrix(handle, handle.mask), _matrix(handle, handle.weight)
            _check_rows(handle, new, protected=handle.fqn in trainer.protected)
            ablated += int((~new.any(1)).sum())
            if permanent:
                assert not (new.any(1) & ~old.any(1)).any()
            assert not after[new & ~old].any()  # grown at zero
            assert torch.equal(after[new & old], values[new & old])  # kept, or dropped and grown again, with its value
            dropped = values.abs().masked_fill(~old, math.inf).flatten().argsort()[: int(int(old.sum()) * drop)]
            regrown += int(new.flatten()[dropped].sum())
            for (name, key), value in kept_states.items():
                if name == handle.fqn:
                    now = _matrix(handle, optimizer.state[handle.weight][key])
                    assert not now[~(new & old)].any()
                    assert torch.equal(now[new & old], _matrix(handle, value)[new & old])
    assert len(updates) == int(STOP * STEPS / EVERY) - 1
    assert sum(updates) > len(updates) // 2
    assert regrown > 0
    assert (ablated > 0) == (ablation is not None)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
