"""``srigl-fx export``: from a function and a checkpoint to a file, and one line for each mistake on the way."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import assert_wrong_usage, document, run
from safetensors.torch import save_file, save_model
from torch import nn
from typer.testing import Result

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.cli.model_source import importable, load_source
from srigl_fx.cli.weights_file import load_weights
from srigl_fx.errors import CheckpointError
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.train import checkpoint

MODELS = """
import torch, srigl_fx as sx
from torch import nn

print("imported")

def dense():
    print("called")
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)), (torch.ones(2, 48),)

def sparse():
    model, inputs = dense()
    return sx.sparsify(model, sparsity=0.75), inputs

def fixed():
    return *sparse(), {"dynamic_batch": False}

def zeros():
    model, inputs = dense()
    with torch.no_grad():
        model[0].weight[:, 8:] = 0
    return model, inputs

def needs(size): ...
def nothing(): ...
def lists(): return [1, 2]
def no_model(): return 1, 2
def odd(): return *sparse(), {"speed": 3}
def no_dict(): return *sparse(), 3
def later():
    import my_parts
    return my_parts.Later(), (torch.ones(2, 48),)

def fails(): raise ValueError("no weights\\nhere")
def leaves(): raise SystemExit(3)
def refuses(): return sx.sparsify(nn.Linear(8, 8), sparsity=7), ()
number = 3
"""


PARTS = """
from torch import nn

class Later(nn.Module):
    def forward(self, x):
        import my_last
        return my_last.last(x)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a module that is imported anew by each test."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    for name in ("my_models", "my_parts", "my_last", "broken", "lacking"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    sys.modules.pop("my_models", None)


def assert_refused(result: Result, *parts: str) -> str:
    """One line of ours on stderr, beside what the module prints."""
    (line,) = [line for line in result.stderr.splitlines() if line not in ("imported", "called")]
    assert result.exit_code == 1
    assert result.stdout == ""
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    return line


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))


def outputs(path: Path) -> torch.Tensor:
    session = sx.runtime.load(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: np.ones((2, 48), np.float32)})
    return torch.from_numpy(y)


@pytest.mark.long
def test_a_function_becomes_a_file(models: Path) -> None:
    found = document("export", "my_models:sparse", "a.onnx", "--min-speedup", 0)
    assert (found["path"], len(found["layers"]), found["dynamic_batch"]) == ("a.onnx", 2, True)
    assert found["library_error"] < 1e-5
    assert [layer["decision"] for layer in found["lowering"]["layers"]] == ["condensed", "condensed"]
    options = ("--min-speedup", 0, "--value-dtype", "int8", "--dynamic-shapes", "none", "--no-fallback", "--beside")
    result = run("export", "my_models.py:sparse", "b.onnx", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("b.onnx: ")
    assert "imported\ncalled\n" in result.stderr
    report = inspect_file(models / "b.onnx")
    assert [node.operator for node in report.nodes] == ["CondensedLinearInt8Relu", "CondensedLinearInt8"]
    assert not report.fallback
    assert sx.runtime.load(models / "b.onnx").get_inputs()[0].shape == [2, 48]


@pytest.mark.long
def test_arguments_come_from_the_function_or_the_command_line(models: Path) -> None:
    assert document("export", "my_models:fixed", "a.onnx", "--no-verify")["dynamic_batch"] is False
    assert_refused(run("export", "my_models:fixed", "a.onnx", "--dynamic-shapes", "none"), "'dynamic_batch'")


@pytest.mark.long
def test_a_checkpoint_of_ours_makes_a_dense_model_sparse(models: Path) -> None:
    model = sx.sparsify(network(), sparsity=0.9)
    checkpoint.save("last.safetensors", model=model)
    result = run("export", "my_models:dense", "a.onnx", "--checkpoint", "last.safetensors", "--min-speedup", 0)
    assert result.exit_code == 0, result.output
    assert "loaded last.safetensors, a checkpoint of srigl_fx" in result.stderr
    torch.testing.assert_close(outputs(models / "a.onnx"), model(torch.ones(2, 48)))
    kept = [(one.name, one.budgets) for one in sx.recipe(model).weights]
    assert [(one.name, one.budgets) for one in onnx_tools.recipe("a.onnx").weights] == kept


@pytest.mark.long
def test_zeros_become_masks(models: Path) -> None:
    report = document("export", "my_models:zeros", "a.onnx", "--adopt", "--min-speedup", 0)
    assert [layer["name"] for layer in report["layers"]] == ["0.weight"]
    assert_refused(run("export", "my_models:zeros", "b.onnx"), "has no masks", "--adopt")
    result = run("export", "my_models:zeros", "b.onnx", "--adopt", "--no-verify", "--min-speedup", 1000)
    assert result.exit_code == 0, result.output
    assert "note: no layer of the file is condensed" in result.stderr


def test_checkpoints_of_all_kinds_load(tmp_path: Path) -> None:
    trained = network().requires_grad_(False)
    trained.get_parameter("0.weight").mul_(2)
    state = trained.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "run.pt")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "plain.safetensors")
    checkpoint.save(tmp_path / "ours.safetensors", model=trained)
    for name in ("plain.pt", "run.pt", "plain.safetensors", "ours.safetensors"):
        model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
        load_weights(model, tmp_path / name, (torch.ones(2, 48),))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), name


def test_parts_with_recipes_of_their_own_load(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": nn.Linear(48, 32), "head": nn.Linear(32, 8)})

    model = build()
    sx.sparsify(model["encoder"], sparsity=0.8)
    checkpoint.save(tmp_path / "a.safetensors", model=model)
    again = build()
    load_weights(again, tmp_path / "a.safetensors", None)
    assert torch.equal(again.get_buffer("encoder.weight_mask"), model.get_buffer("encoder.weight_mask"))
    with pytest.raises(CheckpointError, match="the part 'encoder', which this model lacks"):
        load_weights(network(), tmp_path / "a.safetensors", None)


class Tied(nn.Module):
    """A table whose rows are the weights of the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight


def test_tied_weights_load_from_either_name(tmp_path: Path) -> None:
    trained = Tied()
    save_model(trained, str(tmp_path / "a.safetensors"))
    torch.save({"head.weight": trained.head.weight.detach()}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        model = Tied()
        load_weights(model, tmp_path / name, None)
        assert torch.equal(model.table.weight, trained.table.weight)
        assert model.head.weight is model.table.weight


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3, device="meta"), "torch.float32, torch.strided, meta"),
        (torch.eye(3)[:2].to_sparse(), "torch.float32, torch.sparse_coo, cpu"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.complex64, torch.strided, cpu"),
    ],
)
def test_tensors_without_plain_numbers_are_named(tmp_path: Path, value: torch.Tensor, words: str) -> None:
    torch.save({"weight": value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"weight is no plain tensor there \({words}\)"):
        load_weights(nn.Linear(3, 2, bias=False), tmp_path / "a.pt", None)


class Harmful:
    """What pickle would run if it were let."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, ("harm", "w"))


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(sx.sparsify(network(), sparsity=0.8).state_dict(), "sparse.pt")
    torch.save(network().state_dict(), "dense.pt")
    torch.save({**network().state_dict(), "0.bias": torch.ones(5)}, "shape.pt")
    torch.save({"epoch": 3}, "empty.pt")
    Path("harmful.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"model": Harmful()}, "inside.pt")
    Path("text.pt").write_text("no checkpoint")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, words in {
        "sparse.pt": "the model lacks 0.weight_mask, 2.weight_mask; it is of a sparse model",
        "shape.pt": r"0.bias is \(5,\) there, but \(32,\) here",
        "empty.pt": "holds no state dict",
        "harmful.pt": "would have to be run to be read",
        "inside.pt": "would have to be run to be read",
        "text.pt": "is no checkpoint",
        "none.pt": "there is no checkpoint none.pt",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_weights(model, Path(name), None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not Path("harm").exists()
    with pytest.raises(CheckpointError, match=r"it lacks 0\.weight_mask, 2\.weight_mask; it is of a dense model"):
        load_weights(sx.sparsify(network(), sparsity=0.8), Path("dense.pt"), None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no_models:build", "there is no module no_models"),
        ("my_models.inner:build", "there is no module my_models.inner"),
        ("no_models.py:build", "there is no file no_models.py"),
        ("my_models:densse", "my_models has no function 'densse'; it has dense"),
        ("my_models:number", "my_models:number is a int, no function"),
        ("my_models:needs", "is called without arguments, but missing a required argument: 'size'"),
        ("my_models:nothing", "must return (model, example_inputs)"),
        ("my_models:lists", "not a list"),
        ("my_models:no_model", "the first is a int, no torch.nn.Module"),
        ("my_models:odd", "the argument 'speed', which is none of export_onnx"),
        ("my_models:no_dict", "the third is a int"),
        ("my_models:fails", "failed: ValueError: no weights here ("),
        ("my_models:leaves", "failed: SystemExit: 3 ("),
        ("my_models:refuses", "sparsity"),
        ("broken:build", "importing broken failed: SyntaxError: "),
        ("lacking:build", "importing lacking failed: ModuleNotFoundError: No module named 'not_installed' ("),
    ],
)
def test_a_wrong_source_is_one_line(models: Path, source: str, words: str) -> None:
    (models / "broken.py").write_text("def build(:\n")
    (models / "lacking.py").write_text("\nimport not_installed\n")
    line = assert_refused(run("export", source, "a.onnx"), words)
    if "lacking" in source:
        assert "lacking.py:2)" in line
    if source.endswith("fails"):
        assert "my_models.py:" in line
    assert not Path("a.onnx").exists()


def test_modules_beside_a_file_are_found_when_it_needs_them(models: Path) -> None:
    """By the function, and by the model when it runs."""
    (models / "nets").mkdir()
    (models / "my_models.py").rename(models / "nets" / "my_models.py")
    (models / "nets" / "my_parts.py").write_text(PARTS)
    (models / "nets" / "my_last.py").write_text("def last(x): return x + 1")
    source = "nets/my_models.py:later"
    with importable(source):
        found = load_source(source, frozenset())
        assert torch.equal(found.model(torch.ones(3)), torch.full((3,), 2.0))


def test_a_file_takes_the_place_of_no_module(models: Path) -> None:
    (models / "copy.py").write_text("import torch\n\ndef build(): return torch.nn.Linear(2, 2), ()\n")
    assert load_source("copy.py:build", frozenset()).example_inputs == ()
    assert sys.modules["copy"] is copy


@pytest.mark.parametrize(
    "arguments",
    [
        ("my_models", "a.onnx"),
        (":build", "a.onnx"),
        ("my_models:", "a.onnx"),
        ("my_models:sparse", "a.onnx", "--value-dtype", "int4"),
        ("my_models:sparse", "a.onnx", "--dynamic-shapes", "all"),
        ("my_models:sparse", "a.onnx", "--min-speedup", "fast"),
        ("my_models:sparse",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert_wrong_usage(run("export", *arguments))


@pytest.mark.long
def test_as_a_process_it_prints_one_document(models: Path) -> None:
    """With the working folder on no path of Python's, as an installed command has it."""
    command = [sys.executable, "-P", "-c", "from srigl_fx.cli import main; main()"]
    done = subprocess.run(
        [*command, "export", "my_models:sparse", "a.onnx", "--json"], capture_output=True, text=True, cwd=models
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "a.onnx"
    assert "imported" in done.stderr
