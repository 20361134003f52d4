"""The methods beside SRigL: what each one grows or prunes, what it needs, and that it can be resumed."""

import copy
import io
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import SmallNet, batches, dense_at_step, dense_gradient_sums, loss_of, mask_copies, mlp, same, train

from srigl_fx import sparsify
from srigl_fx.errors import InvariantError, SparsifyError, SriglError, StructureError, TrainerError
from srigl_fx.masks import verify
from srigl_fx.masks.records import Structure, sparse_weights
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static
from srigl_fx.train.base import Trainer
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.schedules import cosine_drop_fraction
from srigl_fx.train.updates import drop_and_grow, set_update, snfs_update

STRUCTURES: tuple[Structure, ...] = ("constant_fan_in", "unstructured")
DYNAMIC: tuple[type[DynamicTrainer], ...] = (RigL, SET, SNFS)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", DYNAMIC)
def test_the_number_of_weights_stays_and_the_structure_holds(
    method: type[DynamicTrainer], structure: Structure
) -> None:
    torch.manual_seed(0)
    model = sparsify(SmallNet(), sparsity=0.8, structure=structure, mask_init="random")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = mask_copies(model)
    trainer = method(model, optimizer, total_steps=40, update_every=5, drop_fraction=0.4)
    losses: list[float] = []
    for x in batches(40, (8, 3, 4, 4)):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        verify(model, optimizer)
    assert trainer.last_update == 25
    for name, mask in mask_copies(model).items():
        assert int(mask.sum()) == int(start[name].sum())
        assert not torch.equal(mask, start[name])
        if structure == "constant_fan_in":
            site = next(handle.record.site for handle in sparse_weights(model) if handle.fqn == name)
            rows = site.to_matrix(mask).sum(dim=1)
            assert torch.equal(rows, site.to_matrix(start[name]).sum(dim=1))
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rigl_grows_by_the_dense_gradient(structure: Structure) -> None:
    model = mlp(structure=structure)
    optimizer = sgd(model)
    trainer = RigL(model, optimizer, total_steps=100, update_every=5, drop_fraction=0.5, auto=False)
    dense = dense_at_step(model, optimizer, list(batches(5)))
    expected = _expected(model, dense)
    assert trainer.step()
    assert same(mask_copies(model), expected)


def test_rigl_in_the_order_of_the_original_updates_instead_of_stepping() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = RigL(model, optimizer, total_steps=100, update_every=4, replace_step=True)
    masks = mask_copies(model)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    for t, x in enumerate(batches(12), start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        now, moved = mask_copies(model), dict(model.named_parameters())
        assert same(now, masks) == (t % 4 != 0)
        for name, value in values.items():
            stayed = (now[name] & masks[name]) if name in now else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(moved[name][stayed], value[stayed]) == (t % 4 == 0)
        masks, values = now, {name: value.detach().clone() for name, value in moved.items()}
    assert (trainer.steps, trainer.last_update) == (12, 12)
    trainer.detach()
    before = model.get_parameter("0.bias").detach().clone()
    train(model, optimizer, batches(4))
    assert not torch.equal(before, model.get_parameter("0.bias"))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_snfs_grows_by_the_decaying_sum_of_all_dense_gradients(structure: Structure) -> None:
    model = mlp(structure=structure)
    optimizer = sgd(model, lr=0.3)
    trainer = SNFS(model, optimizer, total_steps=100, update_every=5, drop_fraction=0.5, auto=False)
    momentum = {handle.fqn: torch.zeros_like(handle.weight) for handle in sparse_weights(model)}
    by_last = momentum
    for t, x in enumerate(batches(10), start=1):
        optimizer.zero_grad()
        dense = dense_gradient_sums(model)
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        momentum = {name: 0.9 * total + dense[name] for name, total in momentum.items()}
        if t % 5 == 0:
            expected, by_last = _expected(model, momentum, step=t), _expected(model, dense, step=t)
            assert trainer.step()
            assert same(mask_copies(model), expected)
    assert not same(expected, by_last)


def _expected(model: nn.Module, growth: dict[str, Tensor], step: int = 5) -> dict[str, Tensor]:
    found = {}
    for handle in sparse_weights(model):
        structure = handle.record.structure
        assert structure is not None
        found[handle.fqn] = drop_and_grow(
            handle.weight,
            growth[handle.fqn],
            handle.mask,
            budget=handle.record.budgets[0],
            drop_fraction=cosine_drop_fraction(step, initial=0.5, end=75),
            structure=structure,
        )
    assert not same(found, mask_copies(model))
    return found


def _set_masks(wrap: Callable[[nn.Module], nn.Module], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model, lr=0.0)
    SET(wrap(model), optimizer, total_steps=100, update_every=2, seed=seed)
    train(model, optimizer, batches(4))
    return mask_copies(model)


def test_set_draws_by_seed_step_and_name_alone() -> None:
    plain = _set_masks(lambda model: model)
    torch.manual_seed(99)
    assert same(plain, _set_masks(lambda model: nn.Sequential(model)))
    assert not same(plain, _set_masks(lambda model: model, seed=1))

    class Draws(SET):
        seen: list[Tensor] = []  # noqa: RUF012 - one list for the test

        def growth(self, layer: Layer) -> Tensor:
            self.seen.append(super().growth(layer))
            return self.seen[-1]

    model = sparsify(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), sparsity=0.5)
    optimizer = sgd(model)
    Draws(model, optimizer, total_steps=100, update_every=2)
    train(model, optimizer, batches(4))
    assert len(Draws.seen) == 4
    assert len({float(scores.sum()) for scores in Draws.seen}) == 4


@pytest.mark.parametrize("method", [SET, SNFS])
def test_the_pure_update_of_a_method_is_what_its_trainer_does(method: type[DynamicTrainer]) -> None:
    model = mlp(structure="unstructured")
    optimizer = sgd(model, lr=0.0)
    trainer = method(model, optimizer, total_steps=100, update_every=1, drop_fraction=0.5, auto=False)
    optimizer.zero_grad()
    dense = dense_gradient_sums(model)
    torch.autograd.backward(loss_of(model, next(batches(1))))
    optimizer.step()
    expected = {}
    for handle in sparse_weights(model):
        drop_fraction = trainer.drop_fraction_at(1)
        if method is SNFS:
            new = snfs_update(handle.weight, dense[handle.fqn], handle.mask, drop_fraction=drop_fraction)
        else:
            draw = torch.Generator().manual_seed(zlib.crc32(f"0:1:{handle.fqn}".encode()))
            new = set_update(handle.weight, handle.mask, drop_fraction=drop_fraction, generator=draw)
        expected[handle.fqn] = new
    assert not same(mask_copies(model), expected)
    assert trainer.step()
    assert same(mask_copies(model), expected)


@pytest.mark.parametrize("method", [SET, GMP, Static])
def test_no_dense_gradient_is_kept_where_none_is_needed(method: type[Trainer]) -> None:
    model = mlp(structure="unstructured")
    optimizer = sgd(model)
    trainer: Trainer = method(model, optimizer, total_steps=20, update_every=2)
    captured = [trainer._engine.window.capturing]
    train(model, optimizer, batches(20), lambda: captured.append(trainer._engine.window.capturing))
    assert not any(captured)
    assert trainer.last_update == (None if method is Static else 14)


@pytest.mark.parametrize("method", [SRigL, RigL, SET, SNFS, GMP, Static])
def test_methods_can_be_exchanged(method: type[Trainer]) -> None:
    model = mlp()
    shared: dict[str, Any] = {"update_every": 4, "drop_fraction": 0.2, "stop_at": 0.5, "grad_samples": 2, "auto": True}
    optimizer = sgd(model)
    trainer: Trainer = method(model, optimizer, total_steps=20, **shared)
    train(model, optimizer, batches(20))
    verify(model, optimizer)
    trainer.detach()
    with pytest.raises(TrainerError, match="total_steps is 0"):
        method(model, optimizer, total_steps=0)
    method(model, optimizer, total_steps=200)


def test_snfs_leaves_grad_samples_aside() -> None:
    model = mlp()
    assert SNFS(model, sgd(model), total_steps=100, update_every=3, grad_samples=5).grad_samples == 1


@pytest.mark.parametrize("trainer_first", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", [RigL, SET, SNFS, GMP, Static])
@pytest.mark.parametrize("stop", [7, 10])
def test_a_resumed_run_ends_in_the_same_bits(
    method: type[Trainer], structure: Structure, stop: int, trainer_first: bool
) -> None:
    data = list(batches(24))

    def start(after: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None) -> tuple[Any, ...]:
        torch.manual_seed(3)
        model = mlp(structure=structure)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        if after is not None:
            after(model, optimizer)
        return model, optimizer, method(model, optimizer, total_steps=24, update_every=5, stop_at=0.9)

    whole, optimizer, trainer = start()
    train(whole, optimizer, data[:stop])
    saved = [part.state_dict() for part in (whole, optimizer, trainer)]
    saved = [torch.load(_written(state), weights_only=True) for state in saved]
    train(whole, optimizer, data[stop:])

    def load(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])

    model, optimizer, trainer = start(None if trainer_first else load)
    if trainer_first:
        load(model, optimizer)
    trainer.load_state_dict(saved[2])
    verify(model, optimizer)
    train(model, optimizer, data[stop:])
    assert same(mask_copies(model), mask_copies(whole))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def _written(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# A method of one's own


def test_a_method_must_say_what_grows() -> None:
    model = mlp()
    optimizer = sgd(model)

    class Nothing(DynamicTrainer):
        pass

    with pytest.raises(TrainerError, match="Nothing overrides neither growth"):
        Nothing(model, optimizer, total_steps=100, update_every=2)
    Static(model, optimizer)


@pytest.mark.parametrize("decay", [0, 1.0, -0.5, 1.5, float("nan"), True, "0.9"])
def test_a_decay_must_let_old_gradients_fade(decay: Any) -> None:
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(TrainerError, match=r"gradient_decay of Mine is .* must lie in \(0, 1\)"):
        type("Mine", (RigL,), {"gradient_decay": decay})(model, optimizer, total_steps=100)
    Static(model, optimizer)


def _run_rule(name: str, rule: Callable[[Layer], Any], structure: Structure = "constant_fan_in", **more: Any) -> None:
    model = mlp(structure=structure)
    optimizer = sgd(model)
    method = type("Mine", (DynamicTrainer,), {name: lambda self, layer: rule(layer), **more})
    trainer = method(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    before = mask_copies(model)
    try:
        train(model, optimizer, batches(2))
    except SriglError:
        assert same(mask_copies(model), before)
        assert trainer.last_update is None
        raise
    verify(model, optimizer)


def _without(layer: Layer, rows: slice, columns: slice = slice(None)) -> Tensor:
    mask = layer.mask.clone()
    if layer.name == "0.weight":
        mask[rows, columns] = False
    return mask


RULES: list[tuple[Callable[[Layer], Any], type[SriglError], str]] = [
    (lambda layer: None, TrainerError, "a NoneType, but must return a bool tensor"),
    (lambda layer: layer.mask.tolist(), TrainerError, "a list, but"),
    (lambda layer: layer.mask.float(), TrainerError, r"a torch.float32 tensor \(32, 24\)"),
    (lambda layer: layer.mask.t(), TrainerError, r"tensor \(24, 32\) .* must return a torch.bool tensor \(32, 24\)"),
    (lambda layer: layer.mask[0], TrainerError, r"tensor \(24,\)"),
    (lambda layer: layer.mask.to("meta"), TrainerError, "on meta, but .* on cpu"),
    (lambda layer: torch.zeros_like(layer.mask), StructureError, "an empty mask"),
    (lambda layer: torch.ones_like(layer.mask), StructureError, "a mask of 768 weights, more than the budget of 192"),
]
FAN_INS: list[tuple[Callable[[Layer], Any], type[SriglError], str]] = [
    (lambda layer: _without(layer, slice(None), slice(0, 3)), StructureError, r"fan-ins \[\d, \d.* each must have 6"),
    (lambda layer: _without(layer, slice(0, 6)), StructureError, r"fan-ins \[6\], but with 26 active .* must have 7"),
    (lambda layer: _without(layer, slice(8, None)), StructureError, r"fan-ins \[6\].*must have 24"),
    (lambda layer: _without(layer, slice(2, None)), StructureError, "2 active rows of 24 inputs, which cannot hold"),
]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("rule", "error", "message"), RULES)
def test_a_mask_that_is_none_is_refused(
    rule: Callable[[Layer], Any], error: type[SriglError], message: str, structure: Structure
) -> None:
    with pytest.raises(error, match=rf"Mine\.new_mask returned for 0\.weight .*{message}"):
        _run_rule("new_mask", rule, structure)


@pytest.mark.parametrize(("rule", "error", "message"), FAN_INS)
def test_a_constant_fan_in_mask_must_have_one(
    rule: Callable[[Layer], Any], error: type[SriglError], message: str
) -> None:
    with pytest.raises(error, match=rf"Mine\.new_mask returned for 0\.weight .*{message}"):
        _run_rule("new_mask", rule)
    _run_rule("new_mask", rule, "unstructured")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda layer: None, "a NoneType, but must return a tensor"),
        (lambda layer: layer.gradient.tolist(), "a list"),
        (lambda layer: layer.mask, "a torch.bool tensor"),
        (lambda layer: layer.gradient.to(torch.complex64), "a torch.complex64 tensor"),
        (
            lambda layer: layer.gradient.t(),
            r"tensor \(24, 32\) on cpu, but must return a floating-point tensor \(32, 24\)",
        ),
        (lambda layer: layer.gradient.mean(), r"tensor \(\)"),
        (lambda layer: layer.gradient.to("meta"), "on meta"),
        (lambda layer: torch.full_like(layer.gradient, torch.nan), "none is finite"),
    ],
)
def test_scores_that_are_none_are_refused(scores: Callable[[Layer], Any], message: str) -> None:
    with pytest.raises(TrainerError, match=rf"Mine\.growth returned for 0\.weight .*{message}"):
        _run_rule("growth", scores)


def test_scores_may_be_partly_not_finite() -> None:
    _run_rule("growth", lambda layer: layer.gradient.masked_fill(layer.mask, torch.nan).double())


@pytest.mark.parametrize("what", ["weight", "mask", "gradient"])
def test_a_rule_that_writes_to_the_model_is_found(what: str) -> None:
    def write(layer: Layer) -> Tensor:
        getattr(layer, what).logical_not_()
        return layer.gradient

    model = mlp(structure="unstructured")
    optimizer = sgd(model)
    method = type("Mine", (DynamicTrainer,), {"growth": lambda self, layer: write(layer)})
    trainer = method(model, optimizer, total_steps=100, update_every=2)
    with pytest.raises(TrainerError, match=rf"Mine wrote to layer\.{what} of 0\.weight.*may be damaged"):
        train(model, optimizer, batches(2))
    assert trainer.last_update is None


@pytest.mark.parametrize("use", [lambda g: g, lambda g: g.abs(), lambda g: g.shape, lambda g: 2 * g, torch.sign, repr])
def test_a_gradient_that_is_not_captured_cannot_be_used(use: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TrainerError, match="needs_gradient is False"):
        _run_rule("growth", lambda layer: use(layer.gradient), needs_gradient=False)
    _run_rule("growth", lambda layer: replace(layer, budget=1).weight, needs_gradient=False)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradual_pruning_is_checked_as_well(structure: Structure) -> None:
    class Odd(GMP):
        def new_mask(self, layer: Layer) -> Tensor:
            mask = super().new_mask(layer)
            mask[0] = False
            return mask

    model = mlp(structure=structure)
    optimizer = sgd(model)
    Odd(model, optimizer, total_steps=40, update_every=5)
    if structure == "unstructured":
        train(model, optimizer, batches(10))
    else:
        with pytest.raises(StructureError, match=r"Odd\.new_mask returned for 0\.weight fan-ins from 0 to"):
            train(model, optimizer, batches(10))


def test_layers_that_are_too_small_for_the_sparsity_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    why = r"Of these, 0\.weight, 2\.weight became dense only because .* lower the sparsity, or use structure=\"unstr"
    with pytest.raises(SparsifyError, match=why):
        sparsify(model, sparsity=0.99)
    sparsify(model, sparsity=0.99, structure="unstructured")


def test_a_method_of_its_own_score_and_schedule() -> None:
    class Leftmost(DynamicTrainer):
        """Grows at the lowest columns, and replaces a third of the weights each time."""

        needs_gradient = False

        def growth(self, layer: Layer) -> Tensor:
            return -torch.arange(layer.mask.shape[1]).expand(layer.mask.shape) + 1000.0

        def drop_fraction_at(self, step: int) -> float:
            return 1 / 3

    model = mlp()
    optimizer = sgd(model, lr=0.0)
    before = mask_copies(model)
    Leftmost(model, optimizer, total_steps=100, update_every=2)
    train(model, optimizer, batches(2))
    for name, mask in mask_copies(model).items():
        grown = mask & ~before[name]
        for row, old in zip(grown, before[name] | mask, strict=True):
            assert old[: int(row.nonzero().max()) if row.any() else 0].all()


# Gradual magnitude pruning


def _counts(model: nn.Module) -> list[list[int]]:
    return [handle.record.site.to_matrix(handle.mask).sum(dim=1).tolist() for handle in sparse_weights(model)]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["dense", "magnitude"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gmp_prunes_to_the_budget_along_the_cubic_schedule(structure: Structure, init: Any) -> None:
    torch.manual_seed(1)
    model = sparsify(SmallNet(), sparsity=0.8, structure=structure, mask_init=init)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = GMP(model, optimizer, total_steps=40, update_every=5)
    assert all(bool(mask.all()) for mask in mask_copies(model).values())
    assert trainer.end == 30
    before = mask_copies(model)
    for t, x in enumerate(batches(40, (8, 3, 4, 4)), start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        verify(model, optimizer)
        now = mask_copies(model)
        assert same(now, before) == (t % 5 != 0 or t > 25)
        assert not any(bool((now[name] & ~before[name]).any()) for name in now)
        before = now
        left = max(0.0, 1 - t // 5 * 5 / 25) ** 3
        for handle, rows in zip(sparse_weights(model), _counts(model), strict=True):
            for block, budget in zip(handle.record.site.blocks, handle.record.budgets, strict=True):
                fan_in = handle.record.site.matrix_shape[1]
                expected = int(budget + left * (block.rows * fan_in - budget) + 1e-6)
                mine = rows[block.start : block.stop]
                if structure == "unstructured":
                    assert sum(mine) == expected
                else:
                    assert set(mine) == {expected // block.rows}
    assert not any(handle.record.dense_start for handle in sparse_weights(model))


def test_a_dense_start_keeps_every_value_and_is_for_gmp_only() -> None:
    dense = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    values = {name: value.clone() for name, value in dense.state_dict().items()}
    model = sparsify(dense, sparsity=0.75, mask_init="dense")
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value)
    verify(model)
    optimizer = sgd(model)
    for method in (SRigL, RigL, SET, SNFS, Static):
        with pytest.raises(TrainerError, match=r"the mask of 0\.weight keeps more weights than its budget.*with GMP"):
            method(model, optimizer, total_steps=100)
    trainer = GMP(model, optimizer, total_steps=20, update_every=5)
    train(model, optimizer, batches(5))
    trainer.detach()
    with pytest.raises(TrainerError, match="unfinished gradual pruning"):
        Static(model, optimizer)
    trainer = GMP(model, optimizer, total_steps=20, update_every=5)
    train(model, optimizer, batches(20))
    trainer.detach()
    Static(model, optimizer)
    verify(model, optimizer)


def test_unequal_rows_and_a_full_mask_are_found_while_and_after_pruning() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32)), sparsity=0.75, mask_init="dense")
    mask, weight = model.get_buffer("0.weight_mask"), model.get_parameter("0.weight")
    mask[3, 5], weight.data[3, 5] = False, 0.0
    with pytest.raises(InvariantError, match="same fan-in, but they range from 23 to 24"):
        verify(model)
    optimizer = sgd(model)
    GMP(model, optimizer, total_steps=20, update_every=5)
    train(model, optimizer, batches(20))
    verify(model, optimizer)
    mask.fill_(True)
    with pytest.raises(InvariantError, match="more than the budget"):
        verify(model)


def test_gmp_needs_room_for_an_update() -> None:
    model = mlp()
    optimizer = sgd(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainerError, match="the masks would never change"):
        GMP(model, optimizer, total_steps=100, update_every=100)
    assert same({name: value.clone() for name, value in model.state_dict().items()}, state)
    assert not any(handle.record.dense_start for handle in sparse_weights(model))
    Static(model, optimizer)


def test_gmp_prunes_frozen_weights_too() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), sparsity=0.75, mask_init="dense")
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    GMP(model, optimizer, total_steps=20, update_every=5)
    train(model, optimizer, batches(20))
    verify(model, optimizer)
    assert int(model.get_buffer("0.weight_mask").sum()) <= sum(sparse_weights(model)[0].record.budgets)


@pytest.mark.parametrize("damage", [{}, {"masks": {}}, {"masks": {"0.weight": torch.ones(2, dtype=torch.bool)}}])
def test_a_damaged_state_of_gmp_is_refused(damage: dict[str, Any]) -> None:
    model = mlp()
    optimizer = sgd(model)
    trainer = GMP(model, optimizer, total_steps=20, update_every=5)
    train(model, optimizer, batches(6))
    before = mask_copies(model)
    state = {**trainer.state_dict(), "extra": damage}
    with pytest.raises(TrainerError, match="damaged at masks"):
        trainer.load_state_dict(state)
    assert same(mask_copies(model), before)
    assert trainer.steps == 6


def test_a_state_of_gmp_needs_the_model_of_its_run() -> None:
    def run(seed: int) -> tuple[nn.Module, GMP]:
        torch.manual_seed(seed)
        model = mlp()
        optimizer = sgd(model)
        trainer = GMP(model, optimizer, total_steps=20, update_every=5)
        train(model, optimizer, batches(6))
        return model, trainer

    (model, trainer), (other, its_trainer) = run(0), run(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InvariantError, match=r"0\.weight: weights off the mask are not zero: .* of another run"):
        its_trainer.load_state_dict(trainer.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    other.load_state_dict(model.state_dict())
    its_trainer.load_state_dict(trainer.state_dict())
    assert same(mask_copies(other), mask_copies(model))


def test_pruning_that_waited_for_step_past_the_end_still_meets_the_budgets() -> None:
    model = sparsify(SmallNet(), sparsity=0.8, mask_init="dense")
    optimizer = sgd(model, lr=0.01)
    trainer = GMP(model, optimizer, total_steps=20, update_every=5, auto=False)
    for x in batches(20, (8, 3, 4, 4)):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
    assert all(bool(mask.all()) for mask in mask_copies(model).values())
    assert trainer.step()
    assert [sum(rows) for rows in _counts(model)] == [
        sum(budget // block.rows * block.rows for block, budget in zip(record.site.blocks, record.budgets, strict=True))
        for record in (handle.record for handle in sparse_weights(model))
    ]
    verify(model, optimizer)
    trainer.detach()
    Static(model, optimizer)


def test_parts_that_were_sparsified_one_by_one_are_saved_apart() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, SNFS]:
        torch.manual_seed(3)
        parts = [sparsify(nn.Sequential(nn.Linear(20, width)), sparsity=0.5) for width in (20, 8)]
        model = nn.Sequential(*parts)
        optimizer = sgd(model)
        return model, optimizer, SNFS(model, optimizer, total_steps=20, update_every=5)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(4, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    model, optimizer, trainer = build()
    run(model, optimizer, range(7))
    assert list(trainer.state_dict()["weights"]) == ["0.0.weight", "1.0.weight"]
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), trainer.state_dict()))
    run(model, optimizer, range(7, 20))
    resumed, its_optimizer, its_trainer = build()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    its_trainer.load_state_dict(saved[2])
    run(resumed, its_optimizer, range(7, 20))
    assert same(mask_copies(resumed), mask_copies(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
