"""Kernels compiled here for another architecture; what they compute there is for ``make arm-test``."""

import subprocess
import sys
from pathlib import Path

import pytest

from srigl_fx.runtime.cpu.kernels.isa import ARCHITECTURE, ARM, TARGETS_OF, X86
from srigl_fx.runtime.ort import compile as compiling
from srigl_fx.runtime.ort import elf, link

# Compiles two small kernels, one of them with loops that become vectors, as all are.
_COMPILE = """
import sys
from pathlib import Path
from srigl_fx.runtime.ort import compile as compiling
compiling._aim()
from srigl_fx.runtime.cpu.kernels import tasks, torch_tasks
torch_tasks.TASKS.clear()
for name in set(tasks.TASKS) - {"plan_linear", "widen_values"}:
    del tasks.TASKS[name]
Path(sys.argv[2]).write_bytes(compiling.compile_object(sys.argv[1]))
"""
OTHER = next(architecture for architecture in (X86, ARM) if architecture != ARCHITECTURE)


@pytest.mark.long
def test_a_kernel_for_another_architecture(tmp_path: Path) -> None:
    """It needs nothing of Python, and of C what a host has; an object of another kind of machine is what comes out."""
    target = TARGETS_OF[OTHER][0]
    path = tmp_path / "kernels.o"
    command = [sys.executable, "-c", _COMPILE, target, str(path)]
    done = subprocess.run(command, env=compiling._environment(target), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = path.read_bytes()
    machine = elf.machine_of(data, kind=elf.ET_REL)
    assert machine is not None
    assert machine.name == OTHER
    assert elf.undefined_symbols([data]) <= link.LIBC_FUNCTIONS
    names = [compiling._kernel_symbol(name, target) for name in ("plan_linear", "widen_values")]
    finished = elf.link_shared([data], exports=names, soname="libkernels.so")
    assert elf.machine_of(finished, kind=elf.ET_DYN) is machine


def test_who_links_for_another_architecture() -> None:
    """The linker of this machine need not know it."""
    assert link.available_linkers(OTHER) == ("python",)
    assert link.available_linkers(ARCHITECTURE) == link.available_linkers()
