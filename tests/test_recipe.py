import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, FormatError, RecipeError
from srigl_fx.recipes import AskedRule, recipes_of
from srigl_fx.restoration import restore
from srigl_fx.train import checkpoint


def _build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 32), nn.ReLU(), nn.Linear(32, 10))


def _masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in sx.masks.named_masks(model)}


def _same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


CALLS: dict[str, dict[str, Any]] = {
    "plain": {"sparsity": 0.75},
    "random": {"sparsity": 0.6, "mask_init": "random", "weight_init": "kaiming", "seed": 5},
    "unstructured": {"structure": "unstructured", "distribution": "uniform"},
    "groups": {"group_size": 4, "mask_init": "random", "rules": {"4": sx.LayerSpec(group_size=8)}},
    "dense start": {"mask_init": "dense"},
    "rules": {
        "rules": {"4": None, "2": sx.LayerSpec(fan_in=7, ablation=0.25), nn.Conv2d: 0.5},
        "distribution": "uniform_rigl",
    },
    "densities": {"distribution": {"0": 0.5, "2.weight": 0.25}},
    "filter": {"filter_fn": lambda name, module: name != "0", "strict": True},
    "inputs": {"example_inputs": (torch.ones(2, 3, 6, 6),)},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_recipe_given_back_makes_the_same_masks_and_records(call: str, tmp_path: Path) -> None:
    model = sx.sparsify(_build(), **CALLS[call])
    recipe = sx.recipe(model)
    recipe.save(tmp_path / "recipe.json")
    read = sx.Recipe.load(tmp_path / "recipe.json")
    assert read == recipe
    assert hash(read) == hash(recipe)
    again = sx.sparsify(_build(), recipe=read)
    _same(model, again)
    assert sx.recipe(again) == recipe
    assert [(row.name, row.reason) for row in sx.summary(again).rows] == [
        (row.name, row.reason) for row in sx.summary(model).rows
    ]
    sx.verify(again)


def test_a_recipe_says_what_was_asked_and_what_was_decided() -> None:
    rules: dict[Any, Any] = {"4": None, "2": sx.LayerSpec(fan_in=7, ablation=0.25), nn.Conv2d: 0.5}
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.8, rules=rules, seed=3))
    assert (recipe.sparsity, recipe.distribution, recipe.seed, recipe.filtered) == (0.8, "erk", 3, False)
    assert recipe.rules == (
        AskedRule(key="4"),
        AskedRule(key="2", spec=sx.LayerSpec(fan_in=7, ablation=0.25)),
        AskedRule(key="torch.nn.modules.conv.Conv2d", is_type=True, spec=sx.LayerSpec(sparsity=0.5)),
    )
    conv, first, last = recipe.weights
    assert (conv.name, conv.shape, conv.budget, conv.fan_in, conv.density) == ("0.weight", (8, 3, 3, 3), 108, 13, 0.5)
    assert (first.budgets, first.fan_in, first.ablation) == ((32 * 7,), 7, (0.25,))
    assert (last.structure, last.reason, last.fan_in) == (None, "the rule '4' leaves it dense", None)
    assert (last.budget, last.density) == (320, 1.0)
    assert "1 of 3" not in str(recipe)
    assert "2 of 3 weights sparse, which may keep 652 of 4632 entries (the budgets, dense" in str(recipe)
    assert "the rule '4' leaves it dense" in str(recipe)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile
def test_a_recipe_rides_with_the_masks_until_finalize() -> None:
    model = sx.sparsify(_build(), sparsity=0.75)
    recipe = sx.recipe(model)
    assert sx.recipe(copy.deepcopy(model)) == recipe
    assert sx.recipe(pickle.loads(pickle.dumps(model))) == recipe
    assert sx.recipe(torch.compile(model)) == recipe  # type: ignore[arg-type]
    assert sx.recipe(nn.DataParallel(model)) == recipe
    with pytest.raises(RecipeError, match="has no recipe"):
        sx.recipe(sx.finalize(model))


def test_a_graph_module_and_its_copies_have_the_recipe() -> None:
    graph = torch.fx.symbolic_trace(_build())
    recipe = sx.recipe(sx.sparsify(graph, sparsity=0.75))
    assert sx.recipe(copy.deepcopy(graph)) == recipe
    _same(sx.sparsify(torch.fx.symbolic_trace(_build()), recipe=recipe), graph)


def test_parts_have_recipes_of_their_own() -> None:
    parts = nn.ModuleDict({"a": _build(), "b": _build()})
    sx.sparsify(parts["a"], sparsity=0.5)
    assert sx.recipe(parts) == sx.recipe(parts["a"])
    sx.sparsify(parts["b"], sparsity=0.75)
    assert recipes_of(parts) == {"a": sx.recipe(parts["a"]), "b": sx.recipe(parts["b"])}
    with pytest.raises(RecipeError, match="'a', 'b'"):
        sx.recipe(parts)
    assert sx.recipe(nn.ModuleDict({"x": parts["a"]})).weights[0].name == "0.weight"


class Twins(nn.Module):
    """Has weights whose names differ by what a wrapper puts in front alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.module = nn.Linear(32, 32), nn.ModuleDict({"fc": nn.Linear(32, 64)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.module["fc"](self.fc(x))
        return y


@pytest.mark.slow
def test_a_child_may_be_called_as_a_wrapper_calls_its_model() -> None:
    model = sx.sparsify(Twins(), sparsity=0.5).eval()
    recipe = sx.recipe(model)
    assert [(weight.name, weight.shape) for weight in recipe.weights] == [
        ("fc.weight", (32, 32)),
        ("module.fc.weight", (64, 32)),
    ]
    again = sx.sparsify(Twins(), recipe=recipe)
    assert sx.recipe(again) == recipe
    assert [row.kept for row in sx.summary(again).rows] == [row.kept for row in sx.summary(model).rows]
    assert sx.lower(model, (torch.ones(2, 32),), min_speedup=0).recipe == recipe


def test_a_table_that_has_grown_is_as_large_in_the_recipe() -> None:
    def build(words: int) -> nn.Sequential:
        return nn.Sequential(nn.Embedding(words, 32), nn.Linear(32, 32))

    grown = sx.sparsify(build(40), sparsity=0.5)
    grown[0].weight = nn.Parameter(torch.randn(56, 32))
    recipe = sx.recipe(grown)
    assert [weight.shape for weight in recipe.weights] == [(56, 32), (32, 32)]
    assert sx.recipe(sx.sparsify(build(56), recipe=recipe)) == recipe


@pytest.mark.slow
def test_what_lower_returned_has_its_recipe_elsewhere() -> None:
    lowered = sx.lower(sx.sparsify(Twins()).eval(), (torch.ones(2, 32),), min_speedup=0)
    with pytest.raises(RecipeError, match=r"What srigl_fx\.lower returned has that of its model as \.recipe"):
        sx.recipe(lowered)


def test_released_weights_are_released_in_the_recipe_too() -> None:
    model = sx.sparsify(_build(), sparsity=0.75)
    sx.masks.release(model, ["2.weight"])
    assert sx.recipe(model).weights[1].density == 1.0
    assert sx.recipe(sx.sparsify(_build(), recipe=sx.recipe(model))).weights[1].fan_in == 128


def test_another_seed_is_the_same_structure_with_other_masks() -> None:
    recipe = sx.recipe(sx.sparsify(_build(), mask_init="random"))
    first, second = (sx.sparsify(_build(), recipe=replace(recipe, seed=seed)) for seed in (0, 1))
    for (name, one), (_, other) in zip(sx.masks.named_masks(first), sx.masks.named_masks(second), strict=True):
        assert one.sum() == other.sum()
        assert not torch.equal(one, other), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile
def test_what_wraps_a_model_changes_no_mask() -> None:
    model = sx.sparsify(_build(), mask_init="random", weight_init="kaiming", seed=3)
    again = _build()
    sx.sparsify(torch.compile(again), recipe=sx.recipe(model))  # type: ignore[type-var]
    _same(model, again)


def test_what_says_how_the_first_masks_are_made_can_be_replaced() -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    random = sx.sparsify(_build(), recipe=replace(recipe, mask_init="random", weight_init="kaiming", seed=3))
    _same(random, sx.sparsify(_build(), sparsity=0.75, mask_init="random", weight_init="kaiming", seed=3))
    assert sx.recipe(random) == replace(recipe, mask_init="random", weight_init="kaiming", seed=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.5},
        {"distribution": "uniform"},
        {"structure": "unstructured"},
        {"group_size": 2},
        {"rules": ()},
        {"strict": True},
        {"filtered": True},
        {"sparsity": 0.5, "distribution": "uniform", "seed": 3},
    ],
)
def test_what_the_budgets_were_decided_by_cannot_be_replaced(changes: dict[str, Any]) -> None:
    """The budgets would stay what they are, and the recipe of the model say something else."""
    model = sx.sparsify(_build(), sparsity=0.75, rules={"4": 0.5})
    names = ", ".join(name for name in changes if name != "seed")
    for recipe in (sx.recipe(model), copy.deepcopy(sx.recipe(model)), sx.Recipe.from_dict(sx.recipe(model).to_dict())):
        with pytest.raises(
            RecipeError, match=f"a recipe's {names} cannot be replaced: .*sparsify with other arguments"
        ):
            replace(recipe, **changes)


def test_without_decisions_all_can_be_replaced() -> None:
    assert replace(sx.Recipe(sparsity=0.8), sparsity=0.5) == sx.Recipe(sparsity=0.5)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"sparsity": 0.8}, "leave it out, or the recipe$"),
        ({"seed": 1, "sparsity": 0.8}, "leave them out, or the recipe$"),
        ({"seed": 1}, r"or change the recipe by dataclasses\.replace\(recipe, seed=\.\.\.\)"),
    ],
)
def test_the_remedy_for_an_argument_beside_a_recipe_is_one(arguments: dict[str, Any], remedy: str) -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    with pytest.raises(RecipeError, match=remedy):
        sx.sparsify(_build(), recipe=recipe, **arguments)


def test_a_recipe_tells_budgets_from_what_is_kept() -> None:
    """A fan-in is a whole number, so that a model keeps less than its budgets."""
    model = sx.sparsify(nn.Sequential(nn.Linear(100, 30)), sparsity=0.875)
    kept = sum(int(mask.sum()) for _, mask in sx.masks.named_masks(model))
    assert (sx.recipe(model).weights[0].budget, kept) == (375, 360)
    assert "which may keep 375 of 3000 entries (the budgets" in str(sx.recipe(model))
    assert "360 of 3,000 weights kept" in str(sx.summary(model))


def _other(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = _build()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.__setitem__(4, nn.Linear(32, 11)),
            r"'4.weight' has the shape \(11, 32\), in the recipe \(10, 32\)",
        ),
        (lambda m: m.append(nn.Linear(10, 4)), "'5.weight' is not in the recipe"),
        (lambda m: m.__delitem__(4), "the model has no '4.weight'"),
        (lambda m: m.__setitem__(2, nn.Embedding(32, 128)), "'2.weight' can only stay dense here"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_unchanged(change: Any, words: str) -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    model = _other(change)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match=words):
        sx.sparsify(model, recipe=recipe)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in _other(change).named_modules()
    }
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_all_that_does_not_fit_is_named_in_one_error() -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    with pytest.raises(RecipeError, match=r"'0\.weight' is not in.*the model has no '2\.weight'.*'4\.weight'"):
        sx.sparsify(nn.Sequential(nn.Linear(8, 8)), recipe=replace(recipe, weights=recipe.weights[1:]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.9},
        {"rules": None},
        {"filter_fn": None, "seed": 0},
        {"distribution": "erk"},
        {"structure": "constant_fan_in"},
        {"group_size": 1},
        {"mask_init": "magnitude", "weight_init": "keep"},
        {"strict": False},
    ],
)
def test_other_arguments_beside_a_recipe_are_refused_by_name(arguments: dict[str, Any]) -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    with pytest.raises(RecipeError, match=f"a recipe already says what {', '.join(arguments)} would"):
        sx.sparsify(_build(), recipe=recipe, **arguments)
    assert sx.masks.named_masks(sx.sparsify(_build(), recipe=None, **arguments))


@pytest.mark.parametrize("given", [{}, "erk", 0.9, sx.LayerSpec()])
def test_what_is_no_recipe_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="recipe must be a"):
        sx.sparsify(_build(), recipe=given)


def _edited(**changes: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(sx.recipe(sx.sparsify(_build(), sparsity=0.75, rules={"4": 0.5})).to_dict()))
    for path, value in changes.items():
        *way, last = path.split("__")
        place = data
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[last] = value
    return dict(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no recipe of srigl_fx"),
        (None, "no recipe of srigl_fx"),
        ({"format": "other"}, "no recipe of srigl_fx"),
        (_edited(version=4), "version 4, but this srigl_fx reads versions up to 3: update it"),
        (_edited(version=True), "is damaged: its version is True, and not a number from 1 on"),
        (_edited(version="1"), "its version is '1'"),
        (_edited(version=0), "its version is 0"),
        (_edited(colour="blue"), "'colour' is unknown"),
        ({key: value for key, value in _edited().items() if key != "seed"}, "'seed' is missing"),
        (_edited(sparsity=1.5), "sparsity"),
        (_edited(sparsity=float("nan")), "sparsity"),
        (_edited(sparsity=None), "sparsity"),
        (_edited(seed=1.5), "seed must be of type int"),
        (_edited(seed=True), "seed must be of type int"),
        (_edited(strict=1), "strict must be of type bool"),
        (_edited(structure="blocks"), "structure must be one of"),
        (_edited(structure=[]), "damaged"),
        (_edited(mask_init="luck"), "mask_init must be one of"),
        (_edited(distribution="even"), "distribution must be one of"),
        (_edited(distribution={"0": 1.5}), "distribution must be one of"),
        (_edited(rules={"4": 0.5}), "must be lists"),
        (_edited(rules=[3]), "rule 3 is malformed"),
        (_edited(rules__0__spec={"version": 4}), "version"),
        (_edited(group_size=3), "group_size is the number"),
        (_edited(group_size=True), "group_size is the number"),
        (_edited(group_size=[2]), "group_size is the number"),
        (_edited(weights__0__group_size=3), "the group size must be one of"),
        (_edited(weights__0__group_size=2.0), "the group size must be one of"),
        (_edited(version=1), "'group_size' is unknown"),
        (_edited(rules__0__spec=7), "damaged"),
        (_edited(rules__0__key=7), "malformed"),
        (_edited(weights={}), "must be lists"),
        (_edited(weights=[{}]), "must have the fields"),
        (_edited(weights__0__name=""), "its name is no text"),
        (_edited(weights__1__name="0.weight"), "two decisions for '0.weight'"),
        (_edited(weights__0__shape=[8, -3, 3, 3]), "shape must be whole numbers"),
        (_edited(weights__0__shape=7), "shape must be whole numbers"),
        (_edited(weights__0__shape=[8, 3, 3, 4.0]), "shape must be whole numbers"),
        (_edited(weights__0__budgets=[7]), "cannot keep 7 weights"),
        (_edited(weights__0__budgets=[10**9]), "cannot keep"),
        (_edited(weights__0__budgets=[]), "as many budgets"),
        (_edited(weights__0__rows=[7]), "do not share out"),
        (_edited(weights__0__rows=[0]), "do not share out"),
        (_edited(weights__0__ablation=[-1.0]), "ablation"),
        (_edited(weights__0__ablation=[float("inf")]), "ablation"),
        (_edited(weights__0__structure=None), "stays dense, but has budgets"),
        (_edited(weights__0__structure={}), "damaged|structure"),
        (_edited(weights__0__reason=None), "reason"),
        (_edited(weights__0__reason="x"), "is sparse, but has a reason why it stays dense: 'x'"),
        (_edited(weights__0__feeds_output=2), "feeds_output"),
    ],
)
def test_damaged_data_is_refused(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        sx.Recipe.from_dict(data)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=f"(?s)recipe.json: .*({words})"):
        sx.Recipe.load(path)


def test_a_recipe_of_version_1_is_one_without_groups() -> None:
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75, rules={"4": sx.LayerSpec(sparsity=0.5)}))
    data = _edited(version=1)
    data["rules"][0]["spec"]["version"] = 1
    for place in (data, data["rules"][0]["spec"], *data["weights"]):
        del place["group_size"], place["block_width"]
    assert sx.Recipe.from_dict(data) == recipe
    with pytest.raises(RecipeError, match="must have the fields"):
        sx.Recipe.from_dict({**data, "version": 2, "group_size": 1})
    del data["weights"][0]["budgets"]
    with pytest.raises(RecipeError, match="must have the fields"):
        sx.Recipe.from_dict(data)
    data["weights"] = [3]
    with pytest.raises(RecipeError, match="damaged"):
        sx.Recipe.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"pickle"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        sx.Recipe.load(path)


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no file"):
        sx.Recipe.load(tmp_path / "none.json")
    with pytest.raises(RecipeError, match="cannot be read"):
        sx.Recipe.load(tmp_path)
    with pytest.raises(RecipeError, match="cannot be written"):
        sx.Recipe().save(tmp_path / "no" / "recipe.json")


@pytest.mark.parametrize("path", [".", "", "/", 3, None, "recipe\0.json"])
def test_what_is_no_path_of_a_file_is_refused(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="cannot be written"):
        sx.Recipe().save(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        sx.Recipe.load(path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Editors on Windows put one in front of what they save as UTF-8."""
    recipe = sx.recipe(sx.sparsify(_build(), sparsity=0.75))
    recipe.save(tmp_path / "recipe.json")
    text = (tmp_path / "recipe.json").read_text(encoding="utf-8")
    (tmp_path / "recipe.json").write_text(text, encoding="utf-8-sig")
    assert (tmp_path / "recipe.json").read_bytes()[:3] == b"\xef\xbb\xbf"
    assert sx.Recipe.load(tmp_path / "recipe.json") == recipe


def test_checkpoints_hold_the_recipe(tmp_path: Path) -> None:
    model = sx.sparsify(_build(), sparsity=0.6, mask_init="random", seed=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = sx.SRigL(model, optimizer, total_steps=100, update_every=10)
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, model=model, optimizer=optimizer, trainer=trainer)
    assert checkpoint.recipe(path) == checkpoint.recipe(path, "") == sx.recipe(model)
    again = sx.sparsify(_build(), recipe=checkpoint.recipe(path))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed = sx.SRigL(again, optimizer, total_steps=100, update_every=10)
    checkpoint.load(path, model=again, optimizer=optimizer, trainer=resumed)
    _same(model, again)
    with pytest.raises(CheckpointError, match="one recipe, of the whole model: leave the part out"):
        checkpoint.recipe(path, "encoder")
    checkpoint.save(path, model=_build())
    with pytest.raises(CheckpointError, match="holds no recipe"):
        checkpoint.recipe(path)


def test_a_checkpoint_of_parts_holds_the_recipe_of_each(tmp_path: Path) -> None:
    parts = nn.ModuleDict({"a": _build(), "b": _build()})
    sx.sparsify(parts["a"], sparsity=0.5)
    sx.sparsify(parts["b"], sparsity=0.75)
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, model=parts)
    assert checkpoint.recipe(path, "b") == sx.recipe(parts["b"])
    with pytest.raises(CheckpointError, match="parts 'a', 'b': name one of them as the part"):
        checkpoint.recipe(path)


@pytest.mark.slow
def test_lowered_files_hold_the_recipe(tmp_path: Path) -> None:
    model = sx.sparsify(_build(), sparsity=0.75).eval()
    lowered = sx.lower(model, (torch.ones(2, 3, 6, 6),), min_speedup=0)
    assert lowered.recipe == sx.recipe(model)
    assert copy.deepcopy(lowered).recipe == sx.recipe(model)
    path = tmp_path / "model.srigl"
    lowered.save(path)
    assert sx.load_lowered(path).recipe == sx.recipe(model)
    _same(sx.sparsify(_build(), recipe=sx.load_lowered(path).recipe), model)


@pytest.mark.slow
def test_a_lowered_file_with_a_newer_recipe_is_refused(tmp_path: Path) -> None:
    model = sx.sparsify(_build(), sparsity=0.75).eval()
    path = tmp_path / "model.srigl"
    sx.lower(model, (torch.ones(2, 3, 6, 6),), min_speedup=0).save(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    key = next(iter(header))
    graph = json.loads(header[key])
    tensors = safetensors.torch.load(data)
    graph["extra"]["recipes"][""]["version"] = 9
    safetensors.torch.save_file(tensors, path, {key: json.dumps(graph)})
    with pytest.raises(FormatError, match="version 9"):
        sx.load_lowered(path)
    del graph["extra"]["recipes"]  # as files were before there were recipes
    safetensors.torch.save_file(tensors, path, {key: json.dumps(graph)})
    assert sx.load_lowered(path).recipe is None


def _pruned() -> tuple[nn.Sequential, nn.Sequential]:
    model = sx.sparsify(_build(), sparsity=0.75)
    return model, sx.finalize(copy.deepcopy(model))


def test_masks_are_restored_on_the_weights_that_they_were_saved_with() -> None:
    model, dense = _pruned()
    restored = restore(dense, sx.recipe(model), _masks(model))
    assert restored is dense
    _same(restored, model)
    assert sx.recipe(restored) == sx.recipe(model)
    with pytest.raises(RecipeError, match="has masks already"):
        restore(restored, sx.recipe(model), _masks(model))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda masks: masks.pop("2.weight"), r"'2\.weight' has no mask"),
        (lambda masks: masks.update({"9.weight": masks["2.weight"]}), r"a mask for '9\.weight'"),
        (lambda masks: masks.update({"2.weight": masks["2.weight"].float()}), r"'2\.weight' needs a bool mask"),
        (lambda masks: masks.update({"2.weight": masks["2.weight"][:3]}), r"'2\.weight' needs a bool mask"),
        (lambda masks: masks.update({"2.weight": ~masks["2.weight"]}), r"'2\.weight' is not zero at 832 places"),
        (lambda masks: masks["2.weight"].fill_(True), "more than the budget|keeps"),
    ],
)
def test_masks_of_another_save_are_refused(edit: Any, words: str) -> None:
    model, dense = _pruned()
    masks = _masks(model)
    edit(masks)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(sx.SriglError, match=words):
        restore(dense, sx.recipe(model), masks)
    assert before.keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())
    assert type(dense[2]) is nn.Linear
