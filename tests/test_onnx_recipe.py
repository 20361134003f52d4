"""The recipe of a model in its ONNX file: written by the export, read back, and kept where files are joined."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnx.compose
import pytest
import torch
from cli_support import document, run
from lowering_support import mask_by_hand, randomise
from torch import nn

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.errors import FormatError, RecipeError
from srigl_fx.onnx_export.file import inspect_file

PREFIX = "srigl_fx.recipe."


def _network(inputs: int, outputs: int, **options: Any) -> nn.Module:
    layers = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs))
    return sx.sparsify(randomise(layers), **{"sparsity": 0.75, **options}).eval()


def _by_hand(inputs: int, outputs: int) -> nn.Module:
    """A sparse model that no call of ``sparsify`` has made."""
    return mask_by_hand(randomise(nn.Sequential(nn.Linear(inputs, outputs))), 0.3).eval()


def _export(model: nn.Module, path: Path, inputs: int, *, fallback: bool = True) -> Path:
    path.parent.mkdir(exist_ok=True)
    sx.export_onnx(model, path, (torch.randn(2, inputs),), min_speedup=0, verify=False, fallback=fallback)
    return path


def _renamed(path: Path) -> Path:
    """The file with names of its own, so that it can be joined with another without prefixes."""
    proto = onnx.compose.add_prefix(onnx.load(path), f"{path.stem}.", rename_functions=False)
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return _network(16, 12, rules={"2": 0.5})


@pytest.fixture(scope="module")
def head() -> nn.Module:
    return _network(12, 4, mask_init="random", seed=3)


@pytest.mark.long
def test_an_exported_file_holds_the_recipe(encoder: nn.Module, tmp_path: Path) -> None:
    path = _export(encoder, tmp_path / "model.onnx", 16)
    assert onnx_tools.recipe(path) == onnx_tools.recipe(path, "") == sx.recipe(encoder)
    again = sx.sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12)), recipe=onnx_tools.recipe(path))
    assert sx.recipe(again) == sx.recipe(encoder)
    lowered = sx.lower(encoder, (torch.randn(2, 16),), min_speedup=0)
    lowered.save(tmp_path / "model.srigl")
    for name, module in (("lowered", lowered), ("loaded", sx.load_lowered(tmp_path / "model.srigl"))):
        sx.export_onnx(module, tmp_path / f"{name}.onnx", (torch.randn(2, 16),), verify=False)
        assert onnx_tools.recipe(tmp_path / f"{name}.onnx") == sx.recipe(encoder)


@pytest.mark.slow
def test_a_file_of_a_model_without_a_recipe_holds_none(tmp_path: Path) -> None:
    path = _export(_by_hand(16, 8), tmp_path / "model.onnx", 16)
    assert not inspect_file(path).has_recipe
    with pytest.raises(FormatError, match=r"model\.onnx holds no recipe"):
        onnx_tools.recipe(path)


@pytest.mark.slow
def test_parts_that_were_sparsified_one_by_one_keep_their_names(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("encoder", _network(16, 12))
    model.add_module("head", _network(12, 4, seed=3))
    path = _export(model.eval(), tmp_path / "model.onnx", 16)
    assert onnx_tools.recipe(path, "head") == sx.recipe(model.get_submodule("head"))
    with pytest.raises(FormatError, match="parts 'encoder', 'head': name one of them as the part"):
        onnx_tools.recipe(path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("files", "prefixes", "parts"),
    [
        (("a.onnx", "b.onnx"), ("encoder_", "head/"), ("encoder", "head")),
        (("encoder.onnx", "head.onnx"), ("", ""), ("encoder", "head")),
        (("encoder.onnx", "b.onnx"), ("", "head."), ("encoder", "head")),
        (("one/model.onnx", "two/model.onnx"), ("", "b_"), ("model", "b")),
        (("one/model.onnx", "two/model.onnx"), ("m_", "m."), ("1", "2")),
    ],
)
def test_a_joined_file_holds_both_under_their_names(
    files: tuple[str, str],
    prefixes: tuple[str, str],
    parts: tuple[str, str],
    encoder: nn.Module,
    head: nn.Module,
    tmp_path: Path,
) -> None:
    first = _export(encoder, tmp_path / files[0], 16)
    second = _renamed(_export(head, tmp_path / files[1], 12))
    taken = onnx.load(second).graph.input[0].name
    onnx_tools.merge(first, second, tmp_path / "both.onnx", {"output": taken}, prefixes=prefixes)
    assert onnx_tools.recipe(tmp_path / "both.onnx", parts[0]) == sx.recipe(encoder)
    assert onnx_tools.recipe(tmp_path / "both.onnx", parts[1]) == sx.recipe(head)
    with pytest.raises(FormatError, match=f"parts '{parts[0]}', '{parts[1]}'"):
        onnx_tools.recipe(tmp_path / "both.onnx")


@pytest.mark.long
def test_one_recipe_of_two_files_is_that_of_the_whole(encoder: nn.Module, tmp_path: Path) -> None:
    first = _export(encoder, tmp_path / "first.onnx", 16)
    second = _renamed(_export(_by_hand(12, 4), tmp_path / "second.onnx", 12))
    taken = onnx.load(second).graph.input[0].name
    onnx_tools.merge(first, second, tmp_path / "both.onnx", {"output": taken}, prefixes=("a_", "b_"))
    assert onnx_tools.recipe(tmp_path / "both.onnx") == sx.recipe(encoder)


@pytest.mark.long
def test_a_joined_file_is_joined_again(encoder: nn.Module, head: nn.Module, tmp_path: Path) -> None:
    """Also where a name of one file is that of a part in the other."""
    first, second = _export(encoder, tmp_path / "a.onnx", 16), _export(head, tmp_path / "b.onnx", 12)
    onnx_tools.merge(first, second, tmp_path / "both.onnx", {"output": "input"}, prefixes=("x_", "y_"))
    last = _export(_network(4, 3, seed=5, sparsity=0.5), tmp_path / "last.onnx", 4)
    onnx_tools.merge(tmp_path / "both.onnx", last, tmp_path / "all.onnx", {"y_output": "input"}, prefixes=("", "z_"))
    assert onnx_tools.recipe(tmp_path / "all.onnx", "both.y") == sx.recipe(head)
    assert onnx_tools.recipe(tmp_path / "all.onnx", "z").seed == 5
    (tmp_path / "both.onnx").rename(tmp_path / "w.onnx")
    last.rename(tmp_path / "w.y.onnx")
    onnx_tools.merge(
        tmp_path / "w.onnx", _renamed(tmp_path / "w.y.onnx"), tmp_path / "all.onnx", {"y_output": "w.y.input"}
    )
    assert onnx_tools.recipe(tmp_path / "all.onnx", "1.y") == sx.recipe(head)
    assert onnx_tools.recipe(tmp_path / "all.onnx", "2").seed == 5


@pytest.mark.long
def test_files_that_another_tool_joins_keep_both(encoder: nn.Module, head: nn.Module, tmp_path: Path) -> None:
    first = _export(encoder, tmp_path / "a.onnx", 16, fallback=False)  # functions that both have are refused by onnx
    second = _renamed(_export(head, tmp_path / "b.onnx", 12, fallback=False))
    joined = onnx.compose.merge_models(onnx.load(first), onnx.load(second), io_map=[("output", "b.input")])
    onnx.save(joined, tmp_path / "both.onnx")
    found = {onnx_tools.recipe(tmp_path / "both.onnx", part).seed for part in ("1", "2")}
    assert found == {sx.recipe(encoder).seed, sx.recipe(head).seed}


@pytest.mark.slow
def test_a_densified_file_says_what_its_zeros_are_from(encoder: nn.Module, tmp_path: Path) -> None:
    onnx_tools.densify(_export(encoder, tmp_path / "a.onnx", 16), tmp_path / "dense.onnx")
    assert onnx_tools.recipe(tmp_path / "dense.onnx") == sx.recipe(encoder)


def _edited(path: Path, change: Any) -> Path:
    proto = onnx.load(path)
    (entry,) = [entry for entry in proto.metadata_props if entry.key.startswith(PREFIX)]
    entry.value = change(entry.value)
    onnx.save(proto, path)
    return path


def _newer(text: str) -> str:
    data = json.loads(text)
    data[""]["version"] = 9
    return json.dumps(data)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-9], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "7", "damaged"),
        (lambda text: '{"": 7}', "no recipe of srigl_fx"),
        (lambda text: "[" * 100_000, "damaged"),
        (_newer, "version 9, but this srigl_fx reads versions up to 3"),
    ],
)
def test_a_damaged_recipe_is_refused_and_the_file_still_inspected(
    change: Any, words: str, encoder: nn.Module, head: nn.Module, tmp_path: Path
) -> None:
    path = _edited(_export(encoder, tmp_path / "model.onnx", 16), change)
    with pytest.raises(RecipeError, match=rf"model\.onnx: .*{words}"):
        onnx_tools.recipe(path)
    second = _export(head, tmp_path / "second.onnx", 12)
    with pytest.raises(RecipeError, match=rf"model\.onnx: .*{words}"):
        onnx_tools.merge(path, second, tmp_path / "both.onnx", {"output": "input"}, prefixes=("a_", "b_"))
    assert not (tmp_path / "both.onnx").exists()
    assert len(inspect_file(path).nodes) == 2
    result = run("recipe", path)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")


@pytest.mark.slow
def test_the_command_shows_and_writes_it(encoder: nn.Module, tmp_path: Path) -> None:
    path = _export(encoder, tmp_path / "model.onnx", 16)
    assert "srigl-fx recipe shows the recipe" in run("inspect", path).output
    result = run("recipe", path, "--output", tmp_path / "recipe.json")
    assert result.output == f"{sx.recipe(encoder)}\n"
    assert sx.Recipe.load(tmp_path / "recipe.json") == sx.recipe(encoder)
    assert sx.Recipe.from_dict(document("recipe", path)) == sx.recipe(encoder)
    assert "of the whole model: leave the part out" in run("recipe", path, "--part", "head").output
