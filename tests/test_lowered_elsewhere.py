"""Lowered modules under torch.export and AOTInductor: saved, and run by a process with only the operators of ours."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower

_COMPILER = shutil.which("g++") or shutil.which("clang++")
_IMPORT = "import srigl_fx.runtime.ops"
# Loads what argv names in the way that argv says, runs it on x.pt beside it, and writes y.pt.
_LOAD = """
import sys, warnings
from pathlib import Path
import torch
{imports}
warnings.simplefilter("ignore")
kind, path = sys.argv[1:]
if kind == "export":
    run = torch.export.load(path).module()
else:
    run = torch._inductor.aoti_load_package(path)
folder = Path(path).parent
with torch.no_grad():
    torch.save(run(torch.load(folder / "x.pt")), folder / "y.pt")
print([name for name in ("onnx", "onnxruntime", "srigl_fx.lowering.pipeline") if name in sys.modules])
"""


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = (
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), nn.GELU()),
        *(nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(5 * 13 * 15, 7)),
    )
    return nn.Sequential(*layers), torch.randn(2, 3, 5, 6)


def linears() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 5)
    return nn.Sequential(*layers), torch.randn(2, 48)


def exported(model: nn.Module, x: Tensor) -> tuple[LoweredModule, torch.export.ExportedProgram]:
    lowered = lower(mask_by_hand(randomise(model), 0.3).eval(), (x,), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    with torch.no_grad():
        return lowered, torch.export.export(lowered, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))


def elsewhere(kind: str, path: Path, imports: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", _LOAD.format(imports=imports), kind, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.export, about its own trees
@pytest.mark.parametrize("make", [convolutions, linears])
def test_a_saved_program_runs_after_one_import(make: Callable[[], tuple[nn.Module, Tensor]], tmp_path: Path) -> None:
    lowered, program = exported(*make())
    torch.export.save(program, tmp_path / "program.pt2")
    x = torch.randn(5, *_sizes(program))
    torch.save(x, tmp_path / "x.pt")
    done = elsewhere("export", tmp_path / "program.pt2", _IMPORT)
    assert done.stdout.strip() == "[]", done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), lowered(x))


def _sizes(program: torch.export.ExportedProgram) -> list[int]:
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return list(node.meta["val"].shape[1:])


@pytest.mark.long
@pytest.mark.skipif(_COMPILER is None, reason="AOTInductor compiles C++, and there is no compiler here")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of inductor, about torch's own
def test_a_compiled_package_runs_after_one_import(tmp_path: Path) -> None:
    lowered, program = exported(*convolutions())  # a linear layer is their last
    x = torch.randn(5, *_sizes(program))
    torch.save(x, tmp_path / "x.pt")
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    done = elsewhere("aoti", Path(package), _IMPORT)
    assert done.stdout.strip() == "[]", done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), lowered(x), rtol=1e-5, atol=1e-5)


def test_a_transposed_convolution_takes_none_for_no_output_padding() -> None:
    """AOTInductor of torch 2.13 hands an operator None where a list is empty."""
    values, indices = torch.randn(4, 2), torch.tensor([[0, 1]] * 4).to(torch.uint16)
    active, bias = torch.arange(4, dtype=torch.int32), torch.zeros(4)
    settings = [4, 3, 2, 2], [2, 2], [0, 0], [1, 1], 1, None, "none", True
    x = torch.randn(1, 3, 5, 5)
    neither: tuple[list[int] | None, ...] = ([], None)
    first, second = (
        torch.ops.srigl_fx.condensed_conv(x, values, indices, active, bias, *settings, extra) for extra in neither
    )
    assert torch.equal(first, second)
    gradients = []
    for extra in neither:
        leaf = x.clone().requires_grad_()
        torch.ops.srigl_fx.condensed_conv(leaf, values, indices, active, bias, *settings, extra).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]
