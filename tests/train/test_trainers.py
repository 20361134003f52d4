import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import (
    batches,
    dense_at_step,
    dense_gradient_sums,
    hook_count,
    loss_of,
    mask_copies,
    mlp,
    same,
    train,
)

from srigl_fx import LayerSpec, sparsify
from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static
from srigl_fx.train.dynamic import Layer
from srigl_fx.train.schedules import cosine_drop_fraction
from srigl_fx.train.updates import srigl_update


def _attach(**options: Any) -> tuple[nn.Sequential, torch.optim.SGD, SRigL]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, SRigL(model, optimizer, **{"total_steps": 100, "update_every": 5, **options})


def test_masks_change_on_schedule_only() -> None:
    model, optimizer, trainer = _attach(total_steps=40, update_every=5, stop_at=0.5)
    changes = []
    before = mask_copies(model)

    def look() -> None:
        nonlocal before
        now = mask_copies(model)
        if not same(before, now):
            changes.append(trainer.steps)
        assert trainer.step() == (not same(before, now))
        before = now

    train(model, optimizer, batches(40), look)
    assert changes == [5, 10, 15]
    assert (trainer.steps, trainer.last_update, trainer.end) == (40, 15, 20)


def test_the_update_is_the_pure_one_on_the_new_weights_and_the_dense_gradient() -> None:
    model, optimizer, trainer = _attach(auto=False, ablation=0.9, drop_fraction=0.5, protect="none")
    dense = dense_at_step(model, optimizer, list(batches(5)))
    expected = {
        handle.fqn: srigl_update(
            handle.weight,
            dense[handle.fqn],
            handle.mask,
            budget=handle.record.budgets[0],
            drop_fraction=cosine_drop_fraction(5, initial=0.5, end=75),
            ablation=0.9,
        )
        for handle in sparse_weights(model)
    }
    before = mask_copies(model)
    assert trainer.step()
    assert same(mask_copies(model), expected)
    assert any(not expected[name].any(dim=1).all() for name in expected)
    assert not same(before, expected)


def test_manual_stepping() -> None:
    model, optimizer, trainer = _attach(auto=False, update_every=3)
    start = mask_copies(model)
    answers = []
    train(model, optimizer, batches(7), lambda: answers.append(trainer.step()))
    assert answers == [False, False, True, False, False, True, False]
    assert not same(start, mask_copies(model))


def test_manual_stepping_that_was_forgotten_updates_at_the_next_call() -> None:
    model, optimizer, trainer = _attach(auto=False, update_every=3)
    train(model, optimizer, batches(4))
    assert trainer.last_update is None
    assert trainer.step()
    assert trainer.last_update == 4
    assert trainer.step()  # the last optimizer step did change the topology
    verify(model, optimizer)


def test_static_never_changes_masks() -> None:
    model = mlp()
    start = mask_copies(model)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Static(model, optimizer, total_steps=10)
    train(model, optimizer, batches(10), lambda: verify(model, optimizer))
    assert same(start, mask_copies(model))
    assert (trainer.steps, trainer.last_update, trainer.step()) == (10, None, False)


def test_counts_optimizer_steps_under_accumulation() -> None:
    model, optimizer, trainer = _attach(update_every=2)
    for i, x in enumerate(batches(12)):
        torch.autograd.backward(loss_of(model, x) / 3)
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert (trainer.steps, trainer.last_update) == (4, 4)


def test_several_gradient_samples_are_summed() -> None:
    seen: list[dict[str, Tensor]] = []

    class Spy(SRigL):
        def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> Any:
            seen.append({name: gradient.clone() for name, gradient in gradients.items()})
            return super()._new_masks(step, gradients)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Spy(model, optimizer, total_steps=100, update_every=4, grad_samples=3)
    data = list(batches(4))
    train(model, optimizer, data[:1])
    dense = dense_gradient_sums(model)
    train(model, optimizer, data[1:])
    for name, total in dense.items():
        torch.testing.assert_close(seen[0][name], total)


# Gradients that are not finite


def _spoil(weight: nn.Parameter, trainer: SRigL, step: int) -> None:
    """Make the gradient NaN once ``step`` steps are done."""

    def hook(grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("nan")) if trainer.steps == step else grad

    weight.register_hook(hook)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_waits_for_a_finite_gradient(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, trainer = _attach(update_every=3)
    start = mask_copies(model)
    hidden = model.get_parameter("2.weight")
    for t, x in enumerate(batches(8), start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        if t in (3, 4):  # as an overflow that only touches entries off the mask
            optimizer.zero_grad()
            handle = hidden.register_hook(lambda g: g.clone().fill_(bad))  # type: ignore[no-untyped-call]
            torch.autograd.backward(loss_of(model, x))
            handle.remove()
            assert hidden.grad is not None
            hidden.grad.zero_()
        optimizer.step()
        if t == 4:
            assert same(start, mask_copies(model))
    assert trainer.last_update == 6
    assert not same(start, mask_copies(model))
    assert [record.message for record in caplog.records] == [
        "update at step 3 postponed: non-finite gradients, first of 2.weight"
    ]
    verify(model, optimizer)


def test_a_postponed_update_happens_at_the_next_step() -> None:
    model, optimizer, trainer = _attach(update_every=3)
    hidden = model.get_parameter("2.weight")
    _spoil(hidden, trainer, 2)
    for x in batches(4):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        assert hidden.grad is not None
        hidden.grad.nan_to_num_(0.0)
        optimizer.step()
    assert trainer.last_update == 4


def test_a_postponed_update_is_dropped_at_the_end() -> None:
    model, optimizer, trainer = _attach(total_steps=10, update_every=4, stop_at=0.5)
    start = mask_copies(model)
    hidden = model.get_parameter("2.weight")
    _spoil(hidden, trainer, 3)
    for x in batches(10):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        assert hidden.grad is not None
        hidden.grad.nan_to_num_(0.0)
        optimizer.step()
    assert trainer.last_update is None
    assert same(start, mask_copies(model))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    updates = []
    for t, x in enumerate(batches(14)):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(scaler.scale(loss * float("inf") if t in (0, 3, 4, 9) else loss))
        scaler.step(optimizer)
        scaler.update()
        updates.append(trainer.last_update)
    assert trainer.steps == 10
    assert updates == [None] * 6 + [4] * 5 + [8] * 3
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    verify(model, optimizer)


def test_a_layer_without_a_gradient_keeps_its_mask(caplog: pytest.LogCaptureFixture) -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.used(x)))
            return logits

    model = sparsify(Partial(), sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = mask_copies(model)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=2)
    train(model, optimizer, batches(6))
    now = mask_copies(model)
    assert trainer.last_update == 6
    assert torch.equal(start["unused.weight"], now["unused.weight"])
    assert not torch.equal(start["used.weight"], now["used.weight"])
    unread, without = (record.message for record in caplog.records)
    assert unread.startswith("it is not known what the neurons of unused.weight are")
    assert without == "masks without a gradient stay at step 2: unused.weight"


@pytest.mark.parametrize("kind", [FloatingPointError, "mask"])
@pytest.mark.parametrize("bad", ["0.weight", "2.weight", "4.weight"])
def test_an_update_that_fails_at_one_layer_changes_none(bad: str, kind: Any) -> None:
    class Failing(SRigL):
        fails = True

        def new_mask(self, layer: Layer) -> Tensor:
            new = super().new_mask(layer)
            if self.fails and layer.handle.fqn == bad:
                if kind == "mask":
                    return torch.ones_like(new)
                raise FloatingPointError("on purpose")
            return new

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Failing(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    start = mask_copies(model)
    train(model, optimizer, batches(2))
    with pytest.raises(StructureError if kind == "mask" else FloatingPointError):
        train(model, optimizer, batches(1))
    assert same(start, mask_copies(model))
    assert (trainer.steps, trainer.last_update) == (3, None)
    verify(model, optimizer)
    trainer.fails = False
    train(model, optimizer, batches(1))
    assert (trainer.steps, trainer.last_update) == (4, 4)
    now = mask_copies(model)
    assert not any(torch.equal(start[name], now[name]) for name in start)
    verify(model, optimizer)


# Ablation, and what is spared


def _active(model: nn.Module) -> dict[str, int]:
    return {name: int(mask.flatten(1).any(1).sum()) for name, mask in mask_copies(model).items()}


def test_the_output_layer_is_spared() -> None:
    model, optimizer, trainer = _attach(ablation=1.0, drop_fraction=0.5)
    assert trainer.protected == {"4.weight": "it feeds the model's outputs"}
    train(model, optimizer, batches(15))
    active = _active(model)
    assert active["4.weight"] == 4
    assert active["0.weight"] < 32
    assert active["2.weight"] < 32


def test_layers_are_spared_by_name_and_by_rule() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsify(model, rules={"*": LayerSpec(sparsity=0.75), "0": LayerSpec(sparsity=0.75, ablation=0.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRigL(model, optimizer, total_steps=100, update_every=5, ablation=1.0, drop_fraction=0.5, protect=["2"])
    train(model, optimizer, batches(15), lambda: verify(model, optimizer))
    active = _active(model)
    assert (active["0.weight"], active["2.weight"], active["4.weight"]) == (32, 32, 8)


def test_a_rule_turns_ablation_on_where_the_trainer_has_none() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsify(model, rules={"*": LayerSpec(sparsity=0.75), "0": LayerSpec(sparsity=0.75, ablation=1.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRigL(model, optimizer, total_steps=100, update_every=5, ablation=None, drop_fraction=0.5)
    train(model, optimizer, batches(15), lambda: verify(model, optimizer))
    assert _active(model)["0.weight"] < 32
    assert _active(model)["2.weight"] == 32


def test_min_neurons() -> None:
    model, optimizer, _ = _attach(ablation=1.0, drop_fraction=0.5, min_neurons=30)
    train(model, optimizer, batches(15))
    assert 30 <= _active(model)["0.weight"] <= 32
    assert 30 <= _active(model)["2.weight"] <= 32


def test_permanent_ablation_only_grows() -> None:
    model, optimizer, _ = _attach(ablation=0.9, drop_fraction=0.5, update_every=2, permanent_ablation=True)
    dead = {name: ~mask.any(1) for name, mask in mask_copies(model).items()}

    def look() -> None:
        for name, mask in mask_copies(model).items():
            now = ~mask.any(1)
            assert not (dead[name] & ~now).any()
            dead[name] = now

    train(model, optimizer, batches(30), look)
    assert dead["0.weight"].any()


def test_blocks_of_a_packed_projection_are_updated_one_by_one() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(x.shape[0], -1, 16)
            logits: Tensor = self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
            return logits

    model = sparsify(Attention(), sparsity=0.75, distribution="uniform")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = mask_copies(model)
    SRigL(model, optimizer, total_steps=100, update_every=2, ablation=1.0, drop_fraction=0.5)
    train(model, optimizer, batches(12, (8, 64)), lambda: verify(model, optimizer))
    mask = model.get_buffer("attention.in_proj_weight_mask")
    assert mask.sum(1).tolist() == [4] * 48
    for block in range(3):
        rows = slice(16 * block, 16 * block + 16)
        assert not torch.equal(mask[rows], start["attention.in_proj_weight"][rows])


# What bad input gets


def _untouched(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    assert hook_count(model, optimizer) == 0
    assert same({name: value.clone() for name, value in model.state_dict().items()}, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 10.0}, "total_steps is 10.0"),
        ({"total_steps": None}, "total_steps is None"),
        ({"update_every": 0}, "update_every is 0"),
        ({"update_every": True}, "update_every is True"),
        ({"drop_fraction": 1.5}, r"drop_fraction is 1.5, but must be a number in \[0, 1\]"),
        ({"drop_fraction": float("nan")}, "drop_fraction is nan"),
        ({"stop_at": -0.1}, "stop_at is -0.1"),
        ({"ablation": 2}, 'for a count, use ablation_mode="absolute"'),
        ({"ablation": -0.1}, "ablation is -0.1"),
        ({"ablation": 1.5, "ablation_mode": "absolute"}, "whole number"),
        ({"ablation_mode": "rows"}, "ablation_mode is 'rows'"),
        ({"min_neurons": 0}, "min_neurons is 0"),
        ({"grad_samples": 0}, "grad_samples is 0"),
        ({"grad_samples": 6}, "only 5 steps lie between"),
        ({"protect": "head"}, r"protect=\['head'\]"),
        ({"protect": ["head"]}, "'head' matches no weight of the model; it has 0.weight"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainerError, match=message):
        SRigL(model, optimizer, **{"total_steps": 100, "update_every": 5, **options})
    _untouched(model, optimizer, state)
    SRigL(model, optimizer, total_steps=100)


def test_a_rules_threshold_must_fit_the_mode() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32)), rules={"0": LayerSpec(sparsity=0.5, ablation=3.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainerError, match=r"a rule gives 0\.weight is 3\.0"):
        SRigL(model, optimizer, total_steps=100)
    SRigL(model, optimizer, total_steps=100, ablation_mode="absolute", ablation=2)


def test_models_and_optimizers_that_do_not_fit() -> None:
    dense = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TrainerError, match="no mask-managed weight"):
        SRigL(dense, torch.optim.SGD(dense.parameters(), lr=0.1), total_steps=10)
    model = mlp()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    partial = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(TrainerError, match=r"does not hold 2\.weight, 4\.weight: create it from model\.parameters\(\)"):
        SRigL(model, partial, total_steps=10)
    _untouched(model, partial, state)
    with pytest.raises(TrainerError, match="LBFGS"):
        Static(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TrainerError, match=r"must be a torch\.optim\.Optimizer"):
        Static(model, "sgd")  # type: ignore[arg-type]
    model[2].requires_grad_(False)
    model[4].requires_grad_(False)
    Static(model, partial)


def test_a_second_trainer_is_refused() -> None:
    model, optimizer, trainer = _attach()
    with pytest.raises(TrainerError, match=r"call \.detach\(\)"):
        Static(nn.Sequential(model), optimizer)
    assert hook_count(model, optimizer) == 5
    trainer.detach()
    Static(model, optimizer)


def test_unstructured_masks_are_refused() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32)), structure="unstructured")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StructureError, match=r"0\.weight is unstructured"):
        SRigL(model, optimizer, total_steps=100)
    assert hook_count(model, optimizer) == 0
    Static(model, optimizer)
    train(model, optimizer, batches(3), lambda: verify(model, optimizer))


@pytest.mark.parametrize("method", [SRigL, RigL, SET, SNFS, GMP])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 1000, "update_every": 12_800}, "first update would be at step 12800.*before step 750"),
        ({"total_steps": 100, "update_every": 75}, "lower update_every or leave it out"),
        ({"total_steps": 100, "stop_at": 0.0}, r"which is 0\.0 of 100 steps; check that total_steps counts"),
        ({"total_steps": 2}, "or train with Static"),
    ],
)
def test_a_run_without_any_update_is_refused(method: Any, options: dict[str, Any], message: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainerError, match=f"the masks would never change: .*{message}"):
        method(model, optimizer, **options)
    _untouched(model, optimizer, state)
    method(model, optimizer, total_steps=100, update_every=74)


@pytest.mark.parametrize("method", [SRigL, RigL, SET, SNFS, GMP])
@pytest.mark.parametrize("total", [3, 12, 60, 160])
def test_the_interval_is_a_share_of_the_run(method: Any, total: int) -> None:
    """Whoever says nothing gets updates, at any length of the run."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = method(model, optimizer, total_steps=total)
    assert trainer.update_every == {3: 1, 12: 1, 60: 7, 160: 10}[total]
    train(model, optimizer, batches(trainer.end))
    last = (trainer.end - 1) // trainer.update_every * trainer.update_every
    assert trainer.last_update == last
    assert last > 0


def test_the_interval_leaves_room_for_the_gradients_that_are_summed() -> None:
    assert _attach(total_steps=60, update_every=None, grad_samples=9)[2].update_every == 9


def test_an_update_that_ablates_most_of_a_layer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, _ = _attach(ablation=1.0, drop_fraction=0.5, warn_ablated=0.1)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, batches(4))
        assert not caplog.text
        train(model, optimizer, batches(16))
    (message,) = (record.getMessage() for record in caplog.records)
    assert re.search(
        r"step 5 ablated more than 0\.1 of the active neurons of 0\.weight \(\d+ of 32\), 2\.weight", message
    )
    assert "4.weight" not in message


def test_the_share_that_is_said_can_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, _ = _attach(ablation=1.0, drop_fraction=0.5, warn_ablated=1.0)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, batches(20))
    assert not caplog.text
    assert _active(model)["0.weight"] < 32
    with pytest.raises(TrainerError, match=r"warn_ablated is 1\.5"):
        _attach(warn_ablated=1.5)
