"""From Numba functions to position-independent object files.

Owns ahead-of-time compilation: which kernel is compiled for which instruction set, how functions are
named in the objects, and the constant tables that tie them together. It must not know linking or caching. Numba
vectorises for the CPU it is told of at start-up, and the names of external functions are process-wide, so every object
comes from a process of its own: ``python -m srigl_fx.runtime.ort.compile NAME OUTPUT``. Any machine compiles for any
architecture.
"""

import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import (
    ARCHITECTURE,
    COMPILE_VARIABLE,
    TARGETS,
    TARGETS_OF,
    isa_of,
    llvm_names,
)
from srigl_fx.runtime.cpu.kernels.table import BYTE_TASKS, TASKS, TORCH_TASKS
from srigl_fx.runtime.ort import abi

SHIM = "shim"
OBJECTS_OF = {architecture: (*targets, SHIM) for architecture, targets in TARGETS_OF.items()}
OBJECTS = OBJECTS_OF[ARCHITECTURE]
_TIMEOUT = 1800  # seconds; one part takes about 90 of one idle core, and cores may be few and busy


def _kernel_symbol(name: str, target: str) -> str:
    owner = target if name in BYTE_TASKS else isa_of(target)
    return f"srigl_{name}_{owner.replace('-', '_').replace('+', '_')}"


def _shim_symbol(function: Callable[..., int]) -> str:
    from srigl_fx.runtime.ort.primitives import linked_name

    return abi.ENTRY_POINT if function.__name__ == "register" else linked_name(function)


def _module(llvm: Any, compiled: Any, name: str) -> Any:
    """The LLVM module of one ``cfunc``, in which only ``name`` is visible to other modules."""
    module = llvm.parse_assembly(compiled.inspect_llvm())
    for function in list(module.functions):
        if function.name == compiled.native_name:
            function.name, function.linkage = name, "external"
        elif not function.is_declaration:
            function.linkage = "internal"
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    return module


def _emit(llvm: Any, modules: Sequence[Any], target_name: str) -> bytes:
    """Optimise the modules as one and emit their object file; only the entry point is visible outside the library."""
    whole, *others = modules
    for module in others:
        whole.link_in(module)
    for symbol in (*whole.functions, *whole.global_variables):
        if symbol.name.startswith("srigl_"):
            symbol.visibility = "hidden"
    target = llvm.Target.from_triple(llvm.get_process_triple())
    cpu, features = llvm_names(target_name)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small")
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        whole, llvm.create_pass_builder(machine, options)
    )
    return bytes(machine.emit_object(whole))


def _aim() -> None:
    """Let LLVM, and Numba with it, take this process for one on the architecture that it compiles for.

    Numba asks when the first kernel is imported. What it compiles it loads, too, but in a process that compiles for
    others nothing of that is ever called.
    """
    import llvmlite.binding as llvm

    if (platform.system(), platform.machine()) != ("Linux", ARCHITECTURE):
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        llvm.get_process_triple = lambda: f"{ARCHITECTURE}-unknown-linux-gnu"


def _compile_kernels(target: str) -> bytes:
    import llvmlite.binding as llvm
    import numba

    from srigl_fx.runtime.cpu.kernels import tasks, torch_tasks

    types: Any = numba.types
    llvm.initialize_native_asmprinter()
    signature = types.void(types.CPointer(types.int64), types.int64)
    modules = []
    for name, function in (tasks.TASKS | torch_tasks.TASKS).items():
        if name not in BYTE_TASKS and target != isa_of(target):
            continue
        decorate = numba.cfunc(signature, error_model="numpy", fastmath=tasks.FASTMATH)
        modules.append(_module(llvm, decorate(function), _kernel_symbol(name, target)))
    return _emit(llvm, modules, target)


def _table(name: str, words: Sequence[str], *, constant: bool = True, hidden: bool = True) -> str:
    kind = f"{'hidden' if hidden else 'default'} {'constant' if constant else 'global'}"
    return f"@{name} = {kind} [{len(words)} x i64] [{', '.join(f'i64 {word}' for word in words)}], align 16\n"


def _tables() -> str:
    """LLVM assembly of the library's data: the operators, the kernel tables, the state."""
    from srigl_fx.runtime.ort import shim

    used: set[str] = set()

    def address(symbol: str) -> str:
        used.add(symbol)
        return f"ptrtoint (ptr @{symbol} to i64)"

    kernels = [address(_kernel_symbol(name, target)) for target in TARGETS for name in TASKS]
    tasks = [address(_kernel_symbol(name, target)) for target in TARGETS for name in (*TASKS, *TORCH_TASKS)]
    operators, names = [], []
    for fields in shim.OPERATOR_FIELDS:
        words = ["0"] * (abi.OP_SIZE // abi.WORD)
        for offset, content in fields.items():
            if callable(content):
                words[offset // abi.WORD] = address(_shim_symbol(content))
            elif isinstance(content, str):
                names.append(f'@{content} = private constant [{len(content) + 1} x i8] c"{content}\\00"\n')
                words[offset // abi.WORD] = f"ptrtoint (ptr @{content} to i64)"
            else:
                words[offset // abi.WORD] = str(content)
        operators += words
    state = ["0"] * (abi.STATE_SIZE // abi.WORD)
    return "".join(
        [
            *names,
            _table("srigl_operators", operators),
            _table("srigl_kernels", kernels),
            _table(abi.TASKS_TABLE, tasks, hidden=False),
            _table("srigl_state", state, constant=False),
            *(f"declare hidden void @{symbol}()\n" for symbol in sorted(used)),
        ]
    )


def _compile_shim() -> bytes:
    import llvmlite.binding as llvm
    import numba

    from srigl_fx.runtime.ort import shim

    word: Any = numba.types.int64
    llvm.initialize_native_asmparser()  # cpuid is inline assembly
    llvm.initialize_native_asmprinter()
    modules = []
    for function in (inspect.unwrap(proxy) for proxy in shim.FUNCTIONS):
        signature = word(*[word] * len(inspect.signature(function).parameters))
        compiled = numba.cfunc(signature, error_model="numpy")(function)
        modules.append(_module(llvm, compiled, _shim_symbol(function)))
    tables = llvm.parse_assembly(_tables())
    tables.triple, tables.data_layout = modules[0].triple, modules[0].data_layout
    return _emit(llvm, [*modules, tables], TARGETS[0])


def compile_object(name: str) -> bytes:
    """Compile one object in this process, which must have been started for it.

    Args:
        name: One of ``TARGETS``, for the kernels, or "shim".

    Example:
        >>> compile_object("sparc")
        Traceback (most recent call last):
        srigl_fx.errors.LibraryError: there is no object 'sparc'; one of ..., shim
    """
    if name not in OBJECTS:
        raise LibraryError(f"there is no object {name!r}; one of {', '.join(OBJECTS)}")
    _aim()
    return _compile_shim() if name == SHIM else _compile_kernels(name)


def _environment(target: str) -> dict[str, str]:
    """The environment of a process that compiles for a target."""
    cpu, features = llvm_names(target)
    return {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")} | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        COMPILE_VARIABLE: target,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }


def _spawn(name: str, output: Path, architecture: str) -> None:
    environment = _environment(TARGETS_OF[architecture][0] if name == SHIM else name)
    command = [sys.executable, "-m", __spec__.name, name, str(output)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryError(f"the {name} part of the operator library could not be compiled: {error}") from error
    if done.returncode != 0:
        reason = done.stderr.strip()[-1000:] or f"the compiler ended with status {done.returncode}"
        raise LibraryError(f"the {name} part of the operator library could not be compiled: {reason}")


def compile_all(
    folder: Path, progress: Callable[[int, int], None] | None = None, architecture: str = ARCHITECTURE
) -> list[Path]:
    """Compile all objects of the library, each in a process of its own, as many at a time as there are cores.

    Args:
        folder: Where to write them.
        progress: Called after each with how many are done, and how many there are.
        architecture: The one to compile for.

    Returns:
        The object files.

    Raises:
        LibraryError: One of them does not compile; the message holds the compiler's own.

    Example:
        >>> OBJECTS_OF["aarch64"][0], OBJECTS_OF["x86_64"][0], OBJECTS_OF["x86_64"][-1]
        ('aarch64', 'x86-64', 'shim')
    """
    names = OBJECTS_OF[architecture]
    paths = [folder / f"{name}.o" for name in names]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        parts = [pool.submit(_spawn, name, path, architecture) for name, path in zip(names, paths, strict=True)]
        try:
            for done, part in enumerate(as_completed(parts), 1):
                part.result()
                if progress is not None:
                    progress(done, len(parts))
        except BaseException:  # also where the user interrupts: what has not begun is not begun any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return paths


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(compile_object(sys.argv[1]))
