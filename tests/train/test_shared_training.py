"""Models whose neurons share their inputs: every method keeps it so, saves it, and is stopped where it is broken."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import SmallNet, batches, mask_copies, mlp, same, through_a_file, train

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, InvariantError, RecipeError, RuleError, SparsifyError, StructureError
from srigl_fx.masks import verify
from srigl_fx.masks.records import Structure, sparse_weights
from srigl_fx.masks.row_groups import GROUP_SIZES
from srigl_fx.restoration import restore
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static, checkpoint
from srigl_fx.train.base import Trainer
from srigl_fx.train.dynamic import Layer

METHODS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "SRigL": (SRigL, {"ablation": 0.9, "drop_fraction": 0.5}),
    "RigL": (RigL, {"drop_fraction": 0.5}),
    "SET": (SET, {"drop_fraction": 0.5}),
    "SNFS": (SNFS, {"drop_fraction": 0.5}),
    "GMP": (GMP, {}),
    "Static": (Static, {}),
}
CASES: list[tuple[str, Structure]] = [(name, "constant_fan_in") for name in METHODS]
CASES += [(name, "unstructured") for name in METHODS if name != "SRigL"]


def attach(method: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Trainer:
    kind, own = METHODS[method]
    return kind(model, optimizer, **{"total_steps": 40, "update_every": 4, **own, **options})


def shared(mask: Tensor, groups: list[list[int]]) -> bool:
    """Whether the rows of each group that keep anything keep the same."""
    return all(len({tuple(row) for row in mask[rows].tolist() if any(row)}) <= 1 for rows in groups)


def in_fours(*sections: int) -> list[list[int]]:
    """Runs of rows, each in groups of four and what is left."""
    found, start = [], 0
    for rows in sections:
        found += [list(range(start + at, start + min(rows, at + 4))) for at in range(0, rows, 4)]
        start += rows
    return found


# The sections of SmallNet's weights: convolution groups, projections.
SECTIONS = {
    "conv.weight": (16,),
    "grouped.weight": (8, 8),
    "up.weight": (8,),
    "attention.in_proj_weight": (32, 32, 32),
    "attention.out_proj.weight": (32,),
    "mlp.0.weight": (160,),
    "mlp.2.weight": (32,),
    "head.weight": (4,),
}


@pytest.mark.long
@pytest.mark.parametrize(("method", "structure"), CASES)
def test_neurons_share_their_inputs_throughout_training(method: str, structure: Structure) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(SmallNet(), sparsity=0.8, structure=structure, mask_init="random", group_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = attach(method, model, optimizer)
    start, changed = mask_copies(model), set()
    partly = False
    for x in batches(40, (8, 3, 4, 4)):
        train(model, optimizer, [x])
        verify(model, optimizer)
        for handle in sparse_weights(model):
            mask = handle.record.site.to_matrix(handle.mask)
            groups = in_fours(*SECTIONS[handle.fqn])
            assert shared(mask, groups), handle.fqn
            alive = mask.any(dim=1)
            partly |= any(0 < int(alive[rows].sum()) < len(rows) for rows in groups)
            if not torch.equal(handle.mask, start[handle.fqn]):
                changed.add(handle.fqn)
    assert trainer.steps == 40
    # Of four rows with few inputs there may be no others to choose from.
    assert (len(changed) > 5) == (method != "Static")
    assert partly == (method == "SRigL")  # a neuron is ablated by itself
    kept = {name: int(mask.sum()) for name, mask in mask_copies(model).items()}
    if method in ("RigL", "SET", "SNFS", "Static"):
        assert kept == {name: int(mask.sum()) for name, mask in start.items()}
    for handle in sparse_weights(model):
        assert 0.6 * sum(handle.record.budgets) < kept[handle.fqn] <= sum(handle.record.budgets)


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_every_size_and_rests(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 37), nn.ReLU(), nn.Linear(37, 5))
    sx.sparsify(model, sparsity=0.75, distribution="uniform", group_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = attach("SRigL", model, optimizer)
    train(model, optimizer, batches(8))
    verify(model, optimizer)
    assert trainer.last_update == 8
    for handle in sparse_weights(model):
        rows = len(handle.mask)
        assert shared(handle.mask, [list(range(at, min(rows, at + size))) for at in range(0, rows, size)])
        alone = {tuple(row) for row in handle.mask.tolist() if any(row)}
        assert len(alone) <= -(-rows // size)
    assert ("group_size" in str(model)) == (size > 1)


@pytest.mark.parametrize(("method", "structure"), CASES)
def test_rows_by_themselves_are_what_there_was_before(method: str, structure: Structure) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
        sx.sparsify(model, sparsity=0.75, structure=structure, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        attach(method, model, optimizer)
        train(model, optimizer, batches(12))
        return model.state_dict()

    plain = run()
    for options in ({"group_size": 1}, {"rules": {"*": sx.LayerSpec(group_size=1)}}):
        again = run(**options)
        assert all(torch.equal(value, again[name]) for name, value in plain.items())
    assert not torch.equal(plain["0.weight_mask"], run(group_size=2)["0.weight_mask"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "structure"), CASES)
def test_a_resumed_run_ends_in_the_same_bits(method: str, structure: Structure, tmp_path: Path) -> None:
    data, path = list(batches(24)), tmp_path / "last.safetensors"

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Trainer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 32), nn.ReLU(), nn.Linear(32, 6))
        sx.sparsify(model, sparsity=0.75, distribution="uniform", structure=structure, group_size=4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        return model, optimizer, attach(method, model, optimizer, total_steps=24, update_every=5, stop_at=0.9)

    whole, optimizer, trainer = start()
    train(whole, optimizer, data[:7])
    checkpoint.save(path, model=whole, optimizer=optimizer, trainer=trainer)
    states = [through_a_file(part.state_dict()) for part in (whole, optimizer, trainer)]
    train(whole, optimizer, data[7:])

    for way in ("checkpoint", "states"):
        model, optimizer, trainer = start()
        if way == "checkpoint":
            checkpoint.load(path, model=model, optimizer=optimizer, trainer=trainer)
        else:
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            trainer.load_state_dict(states[2])
        train(model, optimizer, data[7:])
        verify(model, optimizer)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (way, name)


def test_a_state_is_of_a_model_with_the_same_groups(tmp_path: Path) -> None:
    def start(size: int) -> tuple[nn.Module, torch.optim.Optimizer, Trainer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
        sx.sparsify(model, sparsity=0.75, group_size=size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, attach("RigL", model, optimizer)

    model, optimizer, trainer = start(4)
    saved, path = copy.deepcopy(trainer.state_dict()), tmp_path / "last.safetensors"
    checkpoint.save(path, model=model, optimizer=optimizer, trainer=trainer)
    assert checkpoint.recipe(path).group_size == 4
    assert saved["weights"]["0.weight"]["group_size"] == 4
    assert "group_size" not in start(1)[2].state_dict()["weights"]["0.weight"]
    for size in (1, 2, 8):
        other, other_optimizer, other_trainer = start(size)
        before = mask_copies(other)
        with pytest.raises(StructureError, match=r"0\.weight: saved with .*'group_size': 4"):
            other_trainer.load_state_dict(saved)
        with pytest.raises((CheckpointError, StructureError), match=r"0\.weight"):
            checkpoint.load(path, model=other, optimizer=other_optimizer, trainer=other_trainer)
        assert same(mask_copies(other), before)


def _broken() -> tuple[nn.Sequential, Tensor]:
    """A model of which row 6 of the first weight has another input than row 4, 5 and 7."""
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)), sparsity=0.75, group_size=4)
    mask = model.get_buffer("0.weight_mask")
    one, other = int(mask[6].nonzero()[0]), int((~mask[6]).nonzero()[0])
    mask[6, one], mask[6, other] = False, True
    with torch.no_grad():
        model.get_parameter("0.weight")[6, one] = 0
    return model, mask


def test_a_broken_group_is_found_and_named(tmp_path: Path) -> None:
    model, _ = _broken()
    named = r"0\.weight: rows 4-7 share their inputs \(group_size=4\), but do not keep the same ones"
    with pytest.raises(InvariantError, match=named):
        verify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvariantError, match=named):
        checkpoint.save(tmp_path / "last.safetensors", model=model, optimizer=optimizer)
    attach("RigL", model, optimizer, update_every=1)
    before = mask_copies(model)
    with pytest.raises(StructureError, match=r"0\.weight: the mask's rows 4-7 share their inputs"):
        train(model, optimizer, batches(1))
    assert same(mask_copies(model), before)


def test_a_broken_group_of_a_projection_is_named_by_the_weights_own_rows() -> None:
    model = sx.sparsify(nn.MultiheadAttention(16, 2), sparsity=0.5, group_size=8)
    mask, weight = model.get_buffer("in_proj_weight_mask"), model.get_parameter("in_proj_weight")
    mask[30] = mask[30].roll(1)
    with torch.no_grad():
        weight[30] = 0
    with pytest.raises(InvariantError, match=r"in_proj_weight \(rows 16-31, k\): rows 24-31 share their inputs"):
        verify(model)


@pytest.mark.parametrize("structure", ["constant_fan_in", "unstructured"])
@pytest.mark.parametrize("base", [RigL, GMP])
def test_a_method_of_ones_own_is_held_to_it(base: type[Any], structure: Structure) -> None:
    class Odd(base):  # type: ignore[misc]
        def new_mask(self, layer: Layer) -> Tensor:
            mask: Tensor = super().new_mask(layer)
            mask[9] = mask[9].roll(1)
            return mask

    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    sx.sparsify(model, sparsity=0.75, distribution="uniform", structure=structure, group_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Odd(model, optimizer, total_steps=40, update_every=5)
    named = r"Odd\.new_mask returned for 0\.weight a mask whose rows 8-15 share their inputs \(group_size=8\)"
    with pytest.raises(StructureError, match=named):
        train(model, optimizer, batches(5))


@pytest.mark.parametrize("size", [0, -1, 3, 5, 64, 4.0, "4", True, None, [4]])
def test_other_sizes_are_refused(size: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 32))
    with pytest.raises(RuleError, match=r"sparsify: group_size .* one of \(1, 2, 4, 8, 16, 32\), got"):
        sx.sparsify(model, group_size=size)
    assert type(model[0]) is nn.Linear
    if size is not None:
        with pytest.raises(RuleError, match=r"LayerSpec: group_size .* one of"):
            sx.LayerSpec(group_size=size)
        with pytest.raises(RecipeError, match=r"Recipe: group_size .* one of"):
            sx.Recipe(group_size=size)


def test_a_rule_has_a_size_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    rules: dict[Any, Any] = {"0": sx.LayerSpec(group_size=8), "2": sx.LayerSpec(fan_in=5, group_size=1)}
    sx.sparsify(model, sparsity=0.5, distribution="uniform", rules=rules, group_size=2)
    assert [handle.record.group_size for handle in sparse_weights(model)] == [8, 1, 2]
    recipe = sx.recipe(model)
    assert (recipe.group_size, [weight.group_size for weight in recipe.weights]) == (2, [8, 1, 2])
    assert "constant_fan_in, groups of 2" in str(recipe)
    assert "constant_fan_in, groups of 8" in str(recipe)


def test_a_group_may_be_all_rows_of_a_layer() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 5)), sparsity=0.5, group_size=32)
    mask = model.get_buffer("0.weight_mask")
    assert len({tuple(row) for row in mask.tolist()}) == 1
    verify(model)


def test_initial_masks_keep_the_inputs_with_the_largest_sums() -> None:
    model = nn.Sequential(nn.Linear(24, 32))
    sums = model.get_parameter("0.weight").detach().double().abs().reshape(8, 4, 24).sum(dim=1)
    sx.sparsify(model, sparsity=0.75, distribution="uniform", group_size=4)
    chosen = sums.argsort(dim=1, descending=True)[:, :6].sort().values
    assert torch.equal(model.get_buffer("0.weight_mask")[::4].nonzero()[:, 1].reshape(8, 6), chosen)


def test_saved_masks_are_restored_where_they_are_of_such_groups() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32))

    for size, fits in ((4, True), (8, True), (1, False)):
        model = sx.sparsify(build(), sparsity=0.75, distribution="uniform", group_size=size)
        recipe = sx.recipe(sx.sparsify(build(), sparsity=0.75, distribution="uniform", group_size=4))
        masks = {name: mask.clone() for name, mask in sx.masks.named_masks(model)}
        dense = sx.finalize(model)
        if fits:
            assert sparse_weights(restore(dense, recipe, masks))[0].record.group_size == 4
        else:
            with pytest.raises(SparsifyError, match=r"0\.weight: rows 0-3 share their inputs \(group_size=4\)"):
                restore(dense, recipe, masks)


def test_a_released_weight_is_still_sound() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 32)), sparsity=0.75, group_size=4)
    sx.masks.release(model, ["0.weight"])
    verify(model)


@pytest.mark.slow
def test_a_model_with_groups_is_lowered_as_any_other() -> None:
    torch.manual_seed(0)
    model = mlp()
    sx.finalize(model)
    sx.sparsify(model, sparsity=0.75, distribution="uniform", group_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach("SRigL", model, optimizer)
    train(model, optimizer, batches(12))
    x = next(batches(1))
    lowered = sx.lower(model.eval(), (x,), min_speedup=0)
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    torch.testing.assert_close(lowered(x), model(x))
