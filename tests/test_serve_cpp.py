"""A host without Python: the program of examples/serve_cpp, compiled here, serves a BERT that something else pruned."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import srigl_fx as sx

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve_cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")
RUNTIME = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),  # of the exporter of PyTorch
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(RUNTIME is None, reason="this ONNX Runtime has no library that C++ can be linked with"),
]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, beside the library under the name that it asks for."""
    folder = tmp_path_factory.mktemp("serve")
    assert COMPILER is not None
    assert RUNTIME is not None
    (folder / "libonnxruntime.so.1").symlink_to(RUNTIME)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-L{folder}", "-l:libonnxruntime.so.1"]
    command = [COMPILER, EXAMPLE / "serve.cpp", *flags, f"-Wl,-rpath,{folder}", "-o", folder / "serve"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder / "serve"


@pytest.fixture(scope="module")
def condensed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What somebody else pruned (all but the pooler) and exported, and what ``condense_onnx`` made of it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.BertModel(config).eval()
    for layer in model.encoder.modules():
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", amount=0.85)  # type: ignore[no-untyped-call]
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    ids = torch.ones(2, 9, dtype=torch.int64)
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    torch.onnx.export(
        model,
        (),
        folder / "pruned.onnx",
        kwargs={"input_ids": ids, "attention_mask": ids.clone()},
        input_names=list(axes),
        output_names=["hidden", "pooled"],
        dynamic_shapes=axes,
        external_data=False,
        dynamo=True,
    )
    report = sx.condense_onnx(folder / "pruned.onnx", folder / "condensed.onnx", min_speedup=0)
    assert "12 of 13 layers condensed" in str(report)
    return folder / "pruned.onnx", report.path


def run(serve: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(serve), *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=60)


def test_three_lengths(tmp_path: Path, serve: Path, condensed: tuple[Path, Path], library: Path) -> None:
    pruned, path = condensed
    stock = onnxruntime.InferenceSession(pruned, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for length in (1, 17, 64):
        ids, mask = rng.integers(0, 90, (3, length)), np.ones((3, length), np.int64)
        mask[1, length // 2 + 1 :] = 0
        ids.tofile(tmp_path / "ids.bin")
        mask.tofile(tmp_path / "mask.bin")
        inputs = [f"input_ids:int64:3x{length}:ids.bin", f"attention_mask:int64:3x{length}:mask.bin"]
        expected = stock.run(None, {"input_ids": ids, "attention_mask": mask})
        for by in (library, "-"):
            done = run(serve, tmp_path, path, by, 1, *inputs)
            assert done.returncode == 0, done.stderr
            assert re.search(rf"^output_0.bin: hidden float32 3x{length}x48$", done.stdout, re.M)
            assert re.search(r"^median of a call: \d+ us$", done.stdout, re.M)
            for number, array in enumerate(expected):
                got = np.fromfile(tmp_path / f"output_{number}.bin", np.float32).reshape(array.shape)
                np.testing.assert_allclose(got, array, rtol=1e-4, atol=1e-4 * np.abs(array).max())


def test_wrong_input_is_one_line(tmp_path: Path, serve: Path, condensed: tuple[Path, Path], library: Path) -> None:
    np.ones((1, 4), np.int64).tofile(tmp_path / "ids.bin")
    wrong = {
        "input_ids:int64:1x5:ids.bin": "ids.bin holds 32 bytes, and 1x5 of int64 take 40",
        "input_ids:int64:1x:ids.bin": "'1x' is no shape",
        "input_ids:float:1x4:ids.bin": "'float' is no type",
        "input_ids:int64:1x4:no.bin": "cannot read no.bin",
        "input_ids": "'input_ids' is not NAME:TYPE:SHAPE:FILE",
        "ids:int64:1x4:ids.bin": "ids",  # ONNX Runtime says which input it does not know
    }
    for argument, words in wrong.items():
        done = run(serve, tmp_path, condensed[1], library, 1, argument)
        assert done.returncode == 1, argument
        assert words in done.stderr, argument
    done = run(serve, tmp_path, condensed[1], library, "many", "input_ids:int64:1x4:ids.bin")
    assert (done.returncode, done.stderr) == (1, "'many' is no number of threads\n")
    done = run(serve, tmp_path, condensed[1], tmp_path / "no.so", 1, "input_ids:int64:1x4:ids.bin")
    assert done.returncode == 1
    assert "no.so" in done.stderr
    assert run(serve, tmp_path).returncode == 2
