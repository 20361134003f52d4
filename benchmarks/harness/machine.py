"""What the figures were measured on: the processor and the versions of all that was measured.

Owns the description; it must not know what is measured.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "onnxruntime", "scipy", "numba", "llvmlite", "numpy")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def cpu_name() -> str:
    """The processor as it names itself, with family and model: virtual machines often hide the rest."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model\t")
    if part := _cpuinfo("CPU part"):  # Arm, of which Linux has numbers alone
        return f"{name} (implementer {_cpuinfo('CPU implementer')}, part {part}, variant {_cpuinfo('CPU variant')})"
    return f"{name} (family {family}, model {model})" if family else name


def cpu_flags() -> frozenset[str]:
    """The instruction sets of the processor, in Linux' names; empty elsewhere."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def cache_bytes() -> dict[int, int]:
    """Bytes of the data cache of each level, as the first core sees it; empty where the system does not say."""
    sizes = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            size = int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
            sizes[int((index / "level").read_text())] = size
    return sizes


def describe(threads: int, extra: dict[str, str] | None = None) -> str:
    """One paragraph: processor, instruction sets, cores, threads, versions."""
    flags = cpu_flags()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
    sets = [flag for flag in known if flag in flags]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions |= extra or {}
    listed = ", ".join(f"{package} {number}" for package, number in versions.items())
    return (
        f"{cpu_name()}, {', '.join(sets) or 'no vector extensions known'}, {os.cpu_count()} cores, {threads} "
        f"thread{'s' * (threads != 1)}; Python {platform.python_version()}, {listed}."
    )
