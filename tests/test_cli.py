"""The command line: what it prints, and that bad input gets one readable line and exit status 1."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_support import assert_readable_error, assert_wrong_usage, document, page, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srigl_fx import onnx_tools
from srigl_fx.cli import doctor
from srigl_fx.cli.app import GROUPS, app
from srigl_fx.cli.doctor import run_tiny_model, tiny_model
from srigl_fx.errors import FormatError
from srigl_fx.onnx_export.file import FileReport, inspect_file
from srigl_fx.recipes import Recipe
from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.costs import calibration
from srigl_fx.runtime.costs.calibration import WHAT, believable, predicted
from srigl_fx.runtime.costs.cost_model import Machine
from srigl_fx.runtime.costs.timings import Timings
from srigl_fx.runtime.cpu import prepared_weights
from srigl_fx.runtime.ort.library import library_status

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
on_linux = pytest.mark.skipif(not library_status().supported, reason=library_status().reason)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(tiny_model()[0], path)
    return path


def test_without_typer_the_command_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from srigl_fx.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "The command line needs typer: pip install 'srigl-fx[cli]'\n"


def test_without_matplotlib_the_demo_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srigl_fx.cli.machine.DEMO_PACKAGES", {"no_such_module": "matplotlib"})
    assert_readable_error(run("demo"), "needs matplotlib", "pip install 'srigl-fx[demo]'")


def test_the_commands_are_listed() -> None:
    output = run("--help").output
    assert all(command in output for command in COMMANDS)


def test_the_readme_lists_the_commands(checkout: Path) -> None:
    (line,) = [
        line for line in (checkout / "README.md").read_text("utf-8").splitlines() if "the command srigl-fx:" in line
    ]
    assert sorted(line.partition("srigl-fx: ")[2].split(", ")) == sorted(COMMANDS)


def test_the_page_lists_what_commands_take(checkout: Path) -> None:
    text = (checkout / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert page.with_commands(text) == text, "make tables writes the page anew"


@pytest.mark.parametrize("function", [one for group in GROUPS.values() for one in group], ids=lambda one: one.__name__)
def test_the_help_shows_what_the_page_lists(function: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    result = run(function.__name__, "--help")
    assert result.exit_code == 0
    words = " ".join(result.output.replace("│", " ").split())
    for names, _, text in page.parameters(function):
        assert all(name.lower() in words.lower() for name in names)
        assert text.partition(" One of")[0] in words


def test_inspect_lists_each_condensed_layer(tiny: Path) -> None:
    result = run("inspect", tiny)
    assert result.exit_code == 0
    _, condensed = tiny_model()
    (node,) = inspect_file(tiny).nodes
    assert (node.name, node.operator, node.weight_shape) == ("layer.weight", "CondensedLinear", (8, 16))
    assert (node.fan_in, node.active_neurons) == (condensed.k, condensed.n_active) == (3, 7)
    assert node.bytes == condensed.nbytes
    assert node.kept == pytest.approx(21 / 128)
    line = result.stdout.splitlines()[2].split()
    assert line[:6] == ["layer.weight", "CondensedLinear", "8x16", "3/16", "7/8", "16.4%"]
    assert "needs the operator library" in result.output


def test_inspect_as_json(tiny: Path) -> None:
    found, report = document("inspect", tiny), inspect_file(tiny)
    assert found["path"] == str(tiny)
    assert found["file_bytes"] == tiny.stat().st_size
    assert (found["sparse_bytes"], found["dense_bytes"]) == (report.sparse_bytes, report.dense_bytes)
    (node,) = found["nodes"]
    assert (node["name"], node["weight_shape"], node["fan_in"]) == ("layer.weight", [8, 16], 3)
    assert node["kept"] == pytest.approx(21 / 128)


def test_merge_and_densify_write_files(tiny: Path, tmp_path: Path) -> None:
    graph = onnx.load(tiny).graph
    connect = f"{graph.output[0].name}={graph.input[0].name}"
    both, dense = tmp_path / "both.onnx", tmp_path / "dense.onnx"
    assert_wrong_usage(run("merge", tiny, tiny, "--output", both, "--connect", "a=b=c"), "OUTPUT=INPUT")
    twice = ("--connect", "a=b", "--connect", "a=c")
    assert_wrong_usage(run("merge", tiny, tiny, "--output", both, *twice), "a is given twice")
    assert_readable_error(run("merge", tiny, tiny, "--output", both, "--connect", "a=b"), "cannot be joined")
    assert_readable_error(run("densify", tiny, "--output", tmp_path / "no" / "a.onnx"), "there is no folder")
    square = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[n, 8] y) => (float[n, 8] z) { z = Neg (y) }'
    )
    onnx.save(square, tmp_path / "next.onnx")
    connect = f"{graph.output[0].name}=y"
    result = run("merge", tiny, tmp_path / "next.onnx", "--output", both, "--connect", connect, "--prefix", "a_", "b_")
    assert result.exit_code == 0, result.output
    assert inspect_file(both).nodes[0].operator == inspect_file(tiny).nodes[0].operator
    assert run("densify", tiny, "--output", dense).exit_code == 0
    assert "has no condensed layers" in run("inspect", dense).output


def test_inspect_of_a_dense_file(tmp_path: Path) -> None:
    model, _ = tiny_model()
    model.graph.node[0].domain = ""
    onnx.save(model, tmp_path / "other.onnx")
    assert "has no condensed layers" in run("inspect", tmp_path / "other.onnx").output


def _set_shape(model: onnx.ModelProto, shape: list[int]) -> None:
    (attribute,) = (attribute for attribute in model.graph.node[0].attribute if attribute.name == "weight_shape")
    attribute.ints[:] = shape


def _wrong_shape(model: onnx.ModelProto) -> None:
    _set_shape(model, [3, 16])


def _zero_shape(model: onnx.ModelProto) -> None:
    _set_shape(model, [8, 0])


def _missing_constant(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def _missing_input(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[-1]


def _negative_size(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer[:2]:
        tensor.dims[1] = -(2**62)


def _unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].data_type = 99


@pytest.mark.parametrize(
    "spoil", [_wrong_shape, _zero_shape, _missing_constant, _missing_input, _negative_size, _unknown_type]
)
def test_inspect_of_a_malformed_layer(tmp_path: Path, spoil: Callable[[onnx.ModelProto], None]) -> None:
    model, _ = tiny_model()
    spoil(model)
    path = tmp_path / "spoiled.onnx"
    path.write_bytes(model.SerializeToString())
    assert_readable_error(run("inspect", path), "spoiled.onnx", "layer")


@pytest.mark.parametrize("content", [b"", b"this is text, not ONNX", b"\x00\xff" * 50])
def test_inspect_of_another_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    assert_readable_error(run("inspect", path), "other.onnx")


def test_inspect_of_no_file(tmp_path: Path) -> None:
    assert_readable_error(run("inspect", tmp_path / "none.onnx"), "cannot read", "No such file")


@pytest.mark.parametrize("name", ["recipe.json", "recipe.onnxjson", "model.textproto", "model.onnxtxt", "model.onnx"])
def test_a_file_that_is_no_onnx_file_is_one_line_whatever_its_ending(tmp_path: Path, name: str) -> None:
    """By the ending, onnx reads JSON and two other texts, too: a recipe's own file, say."""
    path = tmp_path / name
    Recipe(sparsity=0.8).save(path)
    for command in (["recipe"], ["densify", "--output", tmp_path / "dense.onnx"]):
        result = run(command[0], path, *command[1:])
        assert_readable_error(result, f"{name} is no ONNX file, or a damaged one")
        assert result.output.count("\n") == 1
    with pytest.raises(FormatError, match="is no ONNX file, or a damaged one"):
        onnx_tools.recipe(path)


def test_a_name_that_is_no_text_is_damage(tmp_path: Path) -> None:
    content = tiny_model()[0].SerializeToString()
    name = tiny_model()[0].graph.initializer[0].name.encode()
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(FormatError, match="a name in it is no text"):
        inspect_file(path)


@pytest.mark.long
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_inspect_survives_any_damage(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(tiny_model()[0].SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        report = inspect_file(path)
    except FormatError:
        return
    assert isinstance(report, FileReport)
    assert str(report)


@on_linux
def test_library_prints_and_copies(tmp_path: Path) -> None:
    printed = Path(run("library").stdout.strip())
    found = document("library", "--output", tmp_path)
    copied = Path(found["path"])
    assert found["bytes"] == printed.stat().st_size
    assert printed.is_file()
    assert copied.parent == tmp_path
    assert copied.read_bytes() == printed.read_bytes()


@on_linux
def test_library_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_readable_error(run("library", "--output", tmp_path / "none" / "lib.so"), "cannot copy")
    assert_readable_error(run("library", "--output", run("library").stdout.strip()), "cannot copy", "are the same file")


@on_linux
def test_doctor_runs_a_model_through_the_library() -> None:
    assert run_tiny_model() < 1e-6
    result = run("doctor")
    assert result.exit_code == 0
    for seen in ("onnxruntime", "instruction set", "tiny model in ONNX Runtime", "extra [lightning]", "GPU"):
        assert seen in result.output


@on_linux
def test_doctor_as_json() -> None:
    found = document("doctor")
    assert found["healthy"] is True
    assert {"platform", "torch", "tiny model in ONNX Runtime"} <= {one["what"] for one in found["findings"]}


@pytest.mark.slow
@on_linux
def test_doctor_shows_and_renews_the_stored_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_library", lambda: iter(()))  # it would be built in the new folder
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    expected = predicted(Machine())  # however busy the machine is: test_calibration.py measures it
    monkeypatch.setattr(calibration, "_measured", lambda names, **_: {name: expected[name] for name in names})
    assert "not measured here yet" in run("doctor").output
    timings = Timings.open()
    timings.put(WHAT, {**predicted(Machine()), "condensed few": 4.9e-3})
    timings.put({"operator": "from a busy moment"}, {"dense": 1.0})
    shown = run("doctor").output
    assert "condensed few 4.9 ms" in shown
    assert "not believable" in shown
    renewed = run("doctor", "--renew")
    assert renewed.exit_code == 0
    stored = Timings.open().get(WHAT)
    assert stored is not None
    assert believable(stored, torch.get_num_threads())
    assert doctor.format_probes(stored) in renewed.output
    assert "not believable" not in renewed.output
    assert len(Timings.open()) == 1


def test_condense_takes_a_file_that_is_sparse_already(tmp_path: Path) -> None:
    weight = np.zeros((64, 96), np.float32)
    weight[::8] = 1.5
    graph = "g (float[n,64] x, float[64,96] w) => (float[n,96] y) { y = MatMul (x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {graph}')
    del model.graph.input[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "a.onnx")
    result = run("condense", tmp_path / "a.onnx", tmp_path / "b.onnx", "--min-speedup", 0)
    assert result.exit_code == 0
    assert "1 of 1 layers condensed" in result.output
    assert len(inspect_file(tmp_path / "b.onnx").nodes) == 1
    found = document("condense", tmp_path / "a.onnx", tmp_path / "b.onnx", "--min-speedup", 0)
    assert (found["path"], found["condensed_layers"]) == (str(tmp_path / "b.onnx"), 1)
    assert found["rows"][0]["sparsity"] == 0.875
    assert run("condense", tmp_path / "a.onnx", tmp_path / "b.onnx", "--min-speedup", 0, "--beside").exit_code == 0
    assert len(list(tmp_path.glob("b.onnx.*.data"))) == 1
    assert_readable_error(run("condense", tmp_path / "c.onnx", tmp_path / "d.onnx"), "cannot read")
    assert_wrong_usage(run("condense", tmp_path / "a.onnx", tmp_path / "d.onnx", "--min-speedup", "fast"), "auto or a")
    assert_readable_error(run("condense", tmp_path / "a.onnx", tmp_path / "d.onnx", "--min-sparsity", 0.99), "87.5%")


@pytest.mark.slow
def test_bench_compares_at_each_setting() -> None:
    result = run("bench", "--shape", "64x32", "--sparsity", 0.75, "--batch", 1, "--batch", 3)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[2:4]]
    assert [row[:4] for row in rows] == [["64", "32", "75%", "1"], ["64", "32", "75%", "3"]]
    dense, int8, condensed, gain, gain_int8 = np.array([row[4:] for row in rows], dtype=float).T
    assert np.allclose(gain, dense / condensed, rtol=0.05, atol=0.01)
    assert np.allclose(gain_int8, int8 / condensed, rtol=0.05, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bench_measures_in_a_dtype(dtype: str) -> None:
    result = run("bench", "--shape", "64x32", "--sparsity", 0.75, "--batch", 3, "--value-dtype", dtype)
    assert result.exit_code == 0
    assert f"values in {dtype}." in result.output
    assert (np.array(result.stdout.splitlines()[2].split()[4:], dtype=float) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bench_measures_weights_that_are_packed_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = prepared_weights.pack

    def counted(*given: Any) -> Any:
        packed.append(given[0])
        return pack(*given)

    monkeypatch.setattr(prepared_weights, "pack", counted)
    assert run("bench", "--shape", "128x64", "--sparsity", 0.75, "--batch", 2, "--value-dtype", dtype).exit_code == 0
    assert len(packed) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shape", "64"), ("--shape", "0x5"), ("--sparsity", "1.0"), ("--batch", "0"), ("--value-dtype", "int4")],
)
def test_bench_refuses_what_makes_no_sense(option: str, value: str) -> None:
    assert_wrong_usage(run("bench", option, value), option)
