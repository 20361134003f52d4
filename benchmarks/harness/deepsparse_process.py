"""DeepSparse 1.8.0, measured from here although it needs an environment of its own.

Owns the making of that environment, and the process in it: what it opens, and timers that ask it to time calls between
the turns of the other contenders. Its ONNX Runtime is timed too: the two processes can be compared by it.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.timing import Timer

Array = NDArray[Any]
REQUIREMENTS = ("deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1", "onnxruntime")
WORKER = Path(__file__).with_name("deepsparse_worker.py")


class PeerError(Exception):
    """What a peer refused to do, or why it is not here."""


def default_folder() -> Path:
    """``$SRIGL_FX_PEERS``, or a folder in the cache."""
    if named := os.environ.get("SRIGL_FX_PEERS"):
        return Path(named)
    cache = os.environ.get("SRIGL_FX_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "srigl_fx") / "peers"


def python(folder: Path) -> Path:
    return folder / "deepsparse" / "bin" / "python"


def make_environment(folder: Path) -> Path:
    """Make the virtual environment, with Python 3.11, below ``folder``; about 600 MB, from the package index."""
    interpreter = shutil.which("python3.11")
    if interpreter is None:
        raise PeerError("DeepSparse 1.8.0 needs Python 3.8 to 3.11, and there is no python3.11 on the path")
    subprocess.run([interpreter, "-m", "venv", str(folder / "deepsparse")], check=True)
    subprocess.run([str(python(folder)), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return folder


class Worker:
    """The process; a context manager. One model is open in it at a time."""

    def __init__(self, folder: Path) -> None:
        if not python(folder).exists():
            raise PeerError(
                f"no DeepSparse in {folder}; make its environment: python benchmarks/peers.py --setup-deepsparse"
            )
        self._files = tempfile.TemporaryDirectory(prefix="srigl_fx_peers_")
        self._log = open(Path(self._files.name) / "log.txt", "w+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python(folder)), "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = self._ask(command="versions")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._files.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise PeerError(f"the process of DeepSparse ended: {self._log.read()[-500:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def load(self, model: bytes | Path, inputs: Mapping[str, Array], *, threads: int) -> Array:
        """Open a model in the engine and in the session beside it; return the engine's first output.

        Raises:
            PeerError: The engine or the session refuses the model, or the process ended.
        """
        folder = Path(self._files.name)
        if isinstance(model, bytes):
            path = folder / "model.onnx"
            path.write_bytes(model)
        else:
            path = model
        arrays: dict[str, Any] = dict(inputs)
        np.savez(folder / "inputs.npz", **arrays)
        batch = len(next(iter(inputs.values())))
        output = folder / "output.npy"
        self._ask(
            command="load",
            model=str(path),
            inputs=str(folder / "inputs.npz"),
            output=str(output),
            batch=batch,
            threads=threads,
        )
        loaded: Array = np.load(output)
        return loaded

    def timer(self, contender: str) -> Timer:
        """The timer of "deepsparse" or "ort" for what is open."""

        def taken(calls: int) -> float:
            return float(self._ask(command="time", contender=contender, calls=calls)["seconds"])

        return taken
