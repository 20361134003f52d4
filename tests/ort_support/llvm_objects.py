"""Object files of small programs in LLVM's language, for any architecture that operator libraries exist for."""

from typing import Any

import llvmlite.binding as llvm

from srigl_fx.runtime.cpu.kernels.isa import TARGETS_OF, llvm_names


def object_for(architecture: str, program: str) -> bytes:
    """What LLVM makes of a program, to be linked into a library."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module: Any = llvm.parse_assembly(program)
    module.triple = f"{architecture}-unknown-linux-gnu"
    cpu, features = llvm_names(TARGETS_OF[architecture][0])
    target: Any = llvm.Target.from_triple(module.triple)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small")
    return bytes(machine.emit_object(module))
