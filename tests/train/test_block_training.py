"""Models whose masks are blocks of rows and inputs: trained, saved, checked, and refused where they cannot be."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import SmallNet, batches, mask_copies, same, through_a_file, train

import srigl_fx as sx
from srigl_fx.errors import InvariantError, RecipeError, RuleError, SparsifyError, StructureError
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.restoration import restore
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static, checkpoint
from srigl_fx.train.base import Trainer
from srigl_fx.train.dynamic import Layer

METHODS: dict[str, type[Trainer]] = {"RigL": RigL, "SET": SET, "SNFS": SNFS, "GMP": GMP, "Static": Static}
BLOCKS: dict[str, Any] = {"structure": "block", "group_size": 4, "block_width": 4}


def attach(method: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Trainer:
    return METHODS[method](model, optimizer, **{"total_steps": 40, "update_every": 4, "drop_fraction": 0.5, **options})


def whole(mask: Tensor, height: int, width: int) -> bool:
    """Whether each block of a matrix, counted from its first row, is kept whole or not at all."""
    return all(
        len(set(mask[top : top + height, left : left + width].flatten().tolist())) == 1
        for top in range(0, len(mask), height)
        for left in range(0, mask.shape[1], width)
    )


# The rows of SmallNet's weights that blocks are counted in: convolution groups, projections.
SECTIONS = {
    "grouped.weight": (8, 8),
    "up.weight": (8,),
    "attention.in_proj_weight": (32, 32, 32),
    "attention.out_proj.weight": (32,),
    "mlp.0.weight": (160,),
    "mlp.2.weight": (32,),
    "head.weight": (4,),
}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_whole_throughout_training(method: str) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(SmallNet(), sparsity=0.75, mask_init="random", **BLOCKS)
    reasons = {record.name: record.reason for record in sx.recipe(model).weights if not record.sparse}
    assert reasons["conv.weight"] == "its 27 inputs are no whole blocks of 4"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = attach(method, model, optimizer)
    start, changed = mask_copies(model), set()
    for x in batches(40, (8, 3, 4, 4)):
        train(model, optimizer, [x])
        verify(model, optimizer)
        for handle in sparse_weights(model):
            rows = torch.split(handle.record.site.to_matrix(handle.mask), list(SECTIONS[handle.fqn]))
            assert all(whole(part, 4, 4) for part in rows), handle.fqn
            if not torch.equal(handle.mask, start[handle.fqn]):
                changed.add(handle.fqn)
    assert trainer.steps == 40
    assert (len(changed) > 4) == (method != "Static")
    kept = {name: int(mask.sum()) for name, mask in mask_copies(model).items()}
    if method != "GMP":
        assert kept == {name: int(mask.sum()) for name, mask in start.items()}
    for handle in sparse_weights(model):
        assert 0.6 * sum(handle.record.budgets) < kept[handle.fqn] <= sum(handle.record.budgets)


def test_grown_blocks_start_at_zero_and_kept_ones_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    sx.sparsify(model, sparsity=0.8, distribution="uniform", rules={"2": None}, mask_init="random", **BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    attach("RigL", model, optimizer, update_every=1)
    weight, mask = model.get_parameter("0.weight"), model.get_buffer("0.weight_mask")
    values, before = weight.detach().clone(), mask.clone()
    train(model, optimizer, batches(1, (16, 64)))
    grown = mask & ~before
    assert grown.any()
    assert not weight[grown].any()
    assert torch.equal(weight[mask & before], values[mask & before])
    assert not optimizer.state[weight]["momentum_buffer"][grown].any()


def test_srigl_refuses_blocks_and_says_what_to_do() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 32)), sparsity=0.5, **BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StructureError, match=r"0\.weight is block, but SRigL trains constant fan-in: .* or train with"):
        SRigL(model, optimizer, total_steps=40)
    Static(model, optimizer)  # nothing was attached


def test_the_largest_blocks_are_kept_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32))
    sums = model.get_parameter("0.weight").detach().double().abs().reshape(8, 4, 6, 4).sum(dim=(1, 3)).flatten()
    sx.sparsify(model, sparsity=0.75, distribution="uniform", **BLOCKS)
    kept = model.get_buffer("0.weight_mask").reshape(8, 4, 6, 4)[:, 0, :, 0].flatten()
    assert kept.nonzero()[:, 0].tolist() == sums.topk(12).indices.sort().values.tolist()
    assert "group_size=4, block_width=4" in str(model)


def test_rules_recipes_and_their_versions() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    rules: dict[Any, Any] = {
        "0": sx.LayerSpec(structure="block", group_size=8, block_width=2),
        "2": sx.LayerSpec(structure="unstructured", group_size=1),
    }
    sx.sparsify(model, sparsity=0.5, distribution="uniform", rules=rules, **BLOCKS)
    records = [handle.record for handle in sparse_weights(model)]
    assert [(one.structure, one.group_size, one.block_width) for one in records] == [
        ("block", 8, 2),
        ("unstructured", 1, 1),
        ("block", 4, 4),
    ]
    recipe = sx.recipe(model)
    assert "blocks of 4x4" in str(recipe)
    assert "blocks of 8x2" in str(recipe)
    again = sx.Recipe.from_dict(recipe.to_dict())
    assert again == recipe
    assert again.to_dict()["version"] == 3
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    assert sx.recipe(sx.sparsify(other, recipe=recipe)) == recipe
    # A recipe of version 2 knows groups, and no blocks.
    old = sx.recipe(sx.sparsify(nn.Sequential(nn.Linear(24, 32)), group_size=4)).to_dict()
    data = {key: value for key, value in old.items() if key != "block_width"} | {"version": 2}
    data["weights"] = [{key: value for key, value in one.items() if key != "block_width"} for one in old["weights"]]
    assert sx.Recipe.from_dict(data).weights[0].block_width == 1
    assert sx.LayerSpec.from_dict({"version": 2, "group_size": 4}) == sx.LayerSpec(group_size=4)
    with pytest.raises(RuleError, match="no spec of a version up to 3"):
        sx.LayerSpec.from_dict({"version": 2, "block_width": 4})


@pytest.mark.parametrize("width", [0, -1, 3, 64, 4.0, "4", True, None])
def test_other_widths_are_refused(width: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 32))
    with pytest.raises(RuleError, match=r"sparsify: block_width .* one of \(1, 2, 4, 8, 16, 32\), got"):
        sx.sparsify(model, structure="block", block_width=width)
    assert type(model[0]) is nn.Linear
    if width is not None:
        with pytest.raises(RuleError, match=r"LayerSpec: block_width .* one of"):
            sx.LayerSpec(block_width=width)
        with pytest.raises(RecipeError, match=r"Recipe: block_width .* one of"):
            sx.Recipe(block_width=width)


def test_a_width_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8))
    with pytest.raises(RuleError, match=r"block_width=4 is for blocks, but the structure is 'constant_fan_in'"):
        sx.sparsify(model, block_width=4)
    with pytest.raises(RuleError, match="LayerSpec: block_width needs the structure 'block', not 'unstructured'"):
        sx.LayerSpec(structure="unstructured", block_width=4)
    with pytest.raises(RuleError, match=r"the rule '0' asks for blocks of 4 inputs, but the structure of '0\.weight'"):
        sx.sparsify(model, rules={"0": sx.LayerSpec(block_width=4), "1": sx.LayerSpec(structure="block")})
    with pytest.raises(RuleError, match="fan_in needs the structure 'constant_fan_in'"):
        sx.LayerSpec(structure="block", fan_in=4)
    assert type(model[0]) is nn.Linear
    decision = sx.recipe(sx.sparsify(model, structure="block", group_size=4, block_width=4)).weights[0]
    for changed, problem in (
        ({"block_width": 3}, "the block width must be one of"),
        ({"structure": "unstructured"}, 'blocks of 4 inputs, but not the structure "block"'),
        ({"block_width": 16}, "24 inputs are no whole blocks of 16"),
    ):
        with pytest.raises(RecipeError, match=problem):
            type(decision).from_dict({**decision.to_dict(), **changed})


def test_a_layer_of_other_sizes_stays_dense_or_is_named() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 7), nn.ReLU(), nn.Linear(7, 4))

    model = sx.sparsify(build(), sparsity=0.5, distribution="uniform", **BLOCKS)
    records = {weight.name: weight for weight in sx.recipe(model).weights}
    assert records["4.weight"].reason == "its 7 inputs are no whole blocks of 4"
    # The others make up for it: half of all weights go.
    total = sum(weight.size for weight in records.values())
    assert sum(weight.budget for weight in records.values()) == pytest.approx(total / 2, abs=3)
    with pytest.raises(SparsifyError, match=r"strict=True: '4\.weight' of shape \(4, 7\) cannot be sparse in blocks"):
        sx.sparsify(build(), strict=True, **BLOCKS)
    with pytest.raises(SparsifyError, match=r"the rule '4': .* its 7 inputs are no whole blocks of 4"):
        sx.sparsify(build(), rules={"4": 0.5}, **BLOCKS)
    # Of 7 rows, the last three are blocks of their own.
    mask = model.get_buffer("2.weight_mask")
    assert whole(mask, 4, 4)
    assert 0 < int(mask[4:].sum()) < mask[4:].numel()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    data, path = list(batches(24)), tmp_path / "last.safetensors"

    def start(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Trainer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(24, 34), nn.ReLU(), nn.Linear(34, 32), nn.ReLU(), nn.Linear(32, 8))
        sx.sparsify(model, sparsity=0.75, distribution="uniform", **{**BLOCKS, "block_width": 2, **options})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        return model, optimizer, attach(method, model, optimizer, total_steps=24, update_every=5, stop_at=0.9)

    complete, optimizer, trainer = start()
    train(complete, optimizer, data[:7])
    checkpoint.save(path, model=complete, optimizer=optimizer, trainer=trainer)
    states = [through_a_file(part.state_dict()) for part in (complete, optimizer, trainer)]
    train(complete, optimizer, data[7:])
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
        assert same(complete.state_dict(), model.state_dict()), way
    # A run with blocks of another width is another run.
    model, optimizer, trainer = start(block_width=1)
    before = mask_copies(model)
    with pytest.raises(StructureError, match=r"0\.weight: saved with .*'block_width': 2"):
        trainer.load_state_dict(copy.deepcopy(states[2]))
    assert same(mask_copies(model), before)


def test_a_broken_block_is_found_and_named() -> None:
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)), sparsity=0.75, **BLOCKS)
    mask = model.get_buffer("0.weight_mask")
    row, column = mask.nonzero()[0].tolist()
    mask[row, column] = False
    with torch.no_grad():
        model.get_parameter("0.weight")[row, column] = 0
    top, left = row // 4 * 4, column // 4 * 4
    named = rf"0\.weight: rows {top}-{top + 3} and inputs {left}-{left + 3} are one block"
    with pytest.raises(InvariantError, match=named):
        verify(model)


def test_a_method_of_ones_own_is_held_to_it() -> None:
    class Odd(RigL):
        def new_mask(self, layer: Layer) -> Tensor:
            mask = super().new_mask(layer)
            row = int(mask.any(dim=1).nonzero()[0])
            mask[row] = mask[row].roll(1)
            return mask

    model = sx.sparsify(nn.Sequential(nn.Linear(24, 32)), sparsity=0.75, **BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Odd(model, optimizer, total_steps=40, update_every=5)
    with pytest.raises(StructureError, match=r"Odd\.new_mask returned for 0\.weight a mask whose rows \d+-\d+ and inp"):
        train(model, optimizer, batches(5))


def test_saved_masks_are_restored_where_they_are_of_such_blocks() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32))

    recipe = sx.recipe(sx.sparsify(build(), sparsity=0.75, distribution="uniform", **BLOCKS))
    for options, fits in ((BLOCKS, True), ({**BLOCKS, "block_width": 2}, False)):
        model = sx.sparsify(build(), sparsity=0.75, distribution="uniform", **options)
        masks = {name: mask.clone() for name, mask in sx.masks.named_masks(model)}
        dense = sx.finalize(model)
        if fits:
            assert sparse_weights(restore(dense, recipe, masks))[0].record.block_width == 4
        else:
            with pytest.raises(SparsifyError, match=r"0\.weight: rows \d+-\d+ and inputs \d+-\d+ are one block"):
                restore(dense, recipe, masks)
