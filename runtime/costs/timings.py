"""Measured times, kept on disk so that no machine measures the same thing twice.

Owns the file ``timings.jsonl`` in the cache folder and what makes a time valid here: processor, instruction set,
threads, versions. It must not know what is measured, nor what is concluded from it.

One JSON object a line: ``what`` was measured, ``where``, and the ``seconds``. A line is appended in one write under a
lock, so processes may write at once and be killed at any moment: what can be lost is a line. A line that cannot be read
is dropped, with a logged warning; deleting the file makes everything be measured anew.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from srigl_fx.files import replacing
from srigl_fx.runtime.cache import CACHE_VARIABLE, cache_folders, locked, make_private
from srigl_fx.runtime.cpu.kernels.isa import ISA_VARIABLE

FILE = "timings.jsonl"
_LARGEST = 4 << 20  # bytes, about ten thousand lines; beyond it the older half is dropped
_LOCK = "timings.lock"
_SOURCES = Path(__file__).parent
_logger = logging.getLogger(__name__)

Seconds = dict[str, float]


@functools.cache
def _cpu() -> str:
    """The processor's name with family, model and stepping: virtual machines of several generations share a name.

    On Arm Linux has numbers alone: who made it, which part it is, and its variant and revision.
    """
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    names = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
    numbers = [fields[name] for name in names if name in fields]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({'.'.join(numbers)})" if numbers else name


@functools.cache
def _versions() -> dict[str, str]:
    sources = sorted(path for path in _SOURCES.rglob("*.py") if path.parent.name != "ort")
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return {"runtime": digest, "torch": torch.__version__, "numba": importlib.metadata.version("numba")}


def environment() -> dict[str, Any]:
    """What a measured time depends on besides what was measured; times taken elsewhere are not used.

    ``runtime`` is a hash of the sources of kernels and operators, ``isa`` what SRIGL_FX_ISA asks for.

    Example:
        >>> sorted(environment())
        ['cpu', 'isa', 'numba', 'runtime', 'threads', 'torch']
    """
    isa = os.environ.get(ISA_VARIABLE) or "native"
    return {"cpu": _cpu(), "isa": isa, "threads": torch.get_num_threads(), **_versions()}


class Timings:
    """Seconds by what was measured: read from a file when made, appended to it as they come.

    Nothing here raises for what is wrong with the file or its folder: then times are kept in memory only.

    Args:
        path: The file, whose folder exists; None to keep nothing on disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Timings(Path(folder, FILE)).put({"operator": "linear", "shape": [8, 16]}, {"dense": 2e-6})
        ...     Timings(Path(folder, FILE)).get({"operator": "linear", "shape": [8, 16]})
        {'dense': 2e-06}
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._where = environment()
        self._known: dict[str, Seconds] = {}
        if path is None:
            return
        try:
            lines, damaged = _read(path)
            if damaged or (path.exists() and path.stat().st_size > _LARGEST):
                _mend(path)
        except OSError as error:
            self._give_up(error)
            return
        self._known = {_key(line["what"], line["where"]): line["seconds"] for line in lines}

    @classmethod
    def open(cls) -> "Timings":
        """Those of the cache folder; kept in memory only where SRIGL_FX_CACHE is set to nothing."""
        return cls(timings_path())

    def __len__(self) -> int:
        where = f", {json.dumps(self._where, sort_keys=True)}]"
        return sum(key.endswith(where) for key in self._known)

    def get(self, what: Mapping[str, Any]) -> Seconds | None:
        """The seconds measured for ``what`` in this environment, if any."""
        return self._known.get(_key(what, self._where))

    def put(self, what: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Keep the seconds measured for ``what``, which must be what JSON can hold."""
        self._known[_key(what, self._where)] = dict(seconds)
        if self._path is None:
            return
        line = json.dumps({"what": what, "where": self._where, "seconds": seconds})
        try:
            _append(self._path, line)
        except OSError as error:
            self._give_up(error)

    def drop(self, what: Mapping[str, Any]) -> None:
        """Forget the seconds of ``what`` in this environment, on disk too: what measures it next measures it anew."""
        self._forget(lambda line: _key(line["what"], line["where"]) == _key(what, self._where))

    def clear(self) -> None:
        """Forget everything measured on this processor, whatever the threads and the versions."""
        self._forget(lambda line: line["where"].get("cpu") == self._where["cpu"])

    def by_threads(self, what: Mapping[str, Any]) -> dict[int, Seconds]:
        """The seconds of ``what`` for this processor and these versions, by the number of threads."""
        found: dict[int, Seconds] = {}
        for key, seconds in self._known.items():
            known, where = json.loads(key)
            threads = where.get("threads")
            if known == what and isinstance(threads, int) and {**self._where, "threads": threads} == where:
                found[threads] = seconds
        return dict(sorted(found.items()))

    def _forget(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        for key in list(self._known):
            what, where = json.loads(key)
            if unwanted({"what": what, "where": where}):
                del self._known[key]
        if self._path is None or not self._path.exists():
            return
        try:
            with locked(self._path.parent, _LOCK):
                lines, _ = _read(self._path)
                _write(self._path, [line for line in lines if not unwanted(line)])
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _warn(f"measured times cannot be kept in {self._path}: {error}; set {CACHE_VARIABLE} to a folder of your own")
        self._path = None


def timings_path() -> Path | None:
    """The file of measured times: in the cache folder, which is made; None where there is none or it is not wanted.

    Example:
        >>> timings_path()  # doctest: +SKIP
        PosixPath('/home/me/.cache/srigl_fx/timings.jsonl')
    """
    if os.environ.get(CACHE_VARIABLE) == "":
        return None
    problems = []
    for folder in cache_folders():
        try:
            make_private(folder)
        except OSError as error:
            problems.append(str(error))
        else:
            if os.access(folder, os.W_OK):
                return folder / FILE
            problems.append(f"{folder} cannot be written")
    _warn(f"measured times cannot be kept: {'; '.join(problems)}; set {CACHE_VARIABLE} to a folder of your own")
    return None


@functools.cache
def _warn(message: str) -> None:
    """Log each message once a process."""
    _logger.warning(message)


def _key(what: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    return json.dumps([what, where], sort_keys=True)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are as they should be, and how many are not."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines = [line for line in raw.split(b"\n") if line.strip()]
    good = list(_parsed(lines))
    return good, len(lines) - len(good)


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(read, dict) and all(isinstance(read.get(name), dict) for name in ("what", "where", "seconds")):
            seconds = read["seconds"].values()
            if seconds and all(isinstance(s, float) and 0 < s < math.inf for s in seconds):
                yield read


def _append(path: Path, line: str) -> None:
    with locked(path.parent, _LOCK):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a process that was killed
            os.write(descriptor, f"{chr(10) * torn}{line}\n".encode())
        finally:
            os.close(descriptor)


def _mend(path: Path) -> None:
    """Write the file anew with its good lines, the newest if it has grown too large; all at once or not at all."""
    with locked(path.parent, _LOCK):
        lines, damaged = _read(path)
        if damaged:
            _warn(f"{damaged} lines of {path} could not be read and are dropped; they will be measured anew")
        if path.stat().st_size > _LARGEST:
            lines = lines[len(lines) // 2 :]
        _write(path, lines)


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace the file, all at once or not at all; the lock is held."""
    with replacing(path) as part:
        part.touch(mode=0o600)
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
