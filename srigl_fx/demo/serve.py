"""How the demonstration serves: ONNX files, ONNX Runtime sessions, and what is measured on them.

Owns exporting a trained run and measuring its session; it must not know how runs were trained or are shown.
"""

import functools
import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.demo.dense_int8 import dynamic_int8, static_int8
from srigl_fx.demo.train import Run

BLOCK = 10  # calls of one session in a row before the other has its turn
CALIBRATION = 64  # training samples that given scales are taken from


@dataclass(frozen=True)
class Served:
    """A run's file in float32 or int8, its session and how the two compare with the network in PyTorch."""

    run: Run
    path: Path
    session: ort.InferenceSession
    outputs: np.ndarray
    max_difference: float

    @property
    def file_bytes(self) -> int:
        """The size of the ONNX file."""
        return self.path.stat().st_size

    @property
    def score(self) -> float:
        """Of what ONNX Runtime answered for the test set: accuracy, or the mean squared error of a regression."""
        targets = self.run.split.test_y.numpy()
        if targets.ndim == 1:
            return float((self.outputs.argmax(axis=1) == targets).mean())
        return float(np.square(self.outputs - targets).mean())


@dataclass(frozen=True)
class Pair:
    """A run's two files, in float32 and in int8."""

    whole: Served
    int8: Served


def export_dense(model: nn.Module, path: Path, *inputs: torch.Tensor, free: Sequence[int] = (0,)) -> None:
    """Write ``model`` as any PyTorch user would: one file, a batch of any size, or more ``free`` axes of each input."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # or it lists the optional packages it did without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own, about its own code
        torch.onnx.export(
            model,
            tuple(tensor[:2] for tensor in inputs),
            path,
            dynamo=True,
            verbose=False,
            opset_version=18,
            external_data=False,
            dynamic_shapes=tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _ in inputs),
        )


def serve(run: Run, folder: Path) -> Pair:
    """Export ``run`` into ``folder``, load its files in ONNX Runtime and answer the whole test set with each.

    In int8 it is without further training, a dense one by ONNX Runtime's own tools.

    Args:
        run: A trained network, dense or sparse.
        folder: Where the files are written.
    """
    whole, int8 = (folder / run.file_name(eight_bits=eight_bits) for eight_bits in (False, True))
    inputs = run.split.test_x
    calibration = run.split.train_x[:CALIBRATION] if run.task.convolutional else None
    if run.method == "dense":
        export_dense(run.model, whole, inputs)
        int8.write_bytes(in_eight_bits(whole.read_bytes(), calibration))
    else:
        sx.export_onnx(run.model, whole, (inputs[:2],), min_speedup=0)
        given = None if calibration is None else [calibration]
        sx.export_onnx(
            run.model, int8, (inputs[:CALIBRATION],), min_speedup=0, value_dtype=torch.int8, calibration=given
        )
    with torch.no_grad():
        expected = run.model(inputs).numpy()
    return Pair(_served(run, whole, expected), _served(run, int8, expected))


def _served(run: Run, path: Path, expected: np.ndarray) -> Served:
    session = load(path, threads=1)
    outputs = answer(session, run.split.test_x.numpy())
    return Served(run, path, session, outputs, float(np.abs(outputs - expected).max()))


def in_eight_bits(model: bytes, calibration: torch.Tensor | None = None) -> bytes:
    """A dense file by ONNX Runtime's own tools, with given scales if there are samples to take them from.

    PyTorch's exporter notes the shapes of weights, which ONNX Runtime's tools transpose, and then refuse.
    """
    proto = onnx.load_from_string(model)
    del proto.graph.value_info[:]
    model = proto.SerializeToString()
    if calibration is None:
        return dynamic_int8(model)
    return static_int8(model, {proto.graph.input[0].name: calibration.numpy()})


def load(path: Path, *, threads: int) -> ort.InferenceSession:
    """A session on ``threads`` threads, with the operator library registered."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return sx.runtime.load(path, session_options=options)


def answer(session: ort.InferenceSession, *inputs: np.ndarray) -> np.ndarray:
    """The first output of ``session`` for its inputs."""
    names = (port.name for port in session.get_inputs())
    outputs: np.ndarray = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return outputs


def latencies_us(sessions: Mapping[str, ort.InferenceSession], *sample: np.ndarray, seconds: float) -> dict[str, float]:
    """Median microseconds of one call of each session, measured in turns so that a busy moment hits all alike.

    Args:
        sessions: What to time, by name; all on the same number of threads.
        *sample: The inputs of every call.
        seconds: About how long to measure.
    """
    calls = {name: functools.partial(answer, session, *sample) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(times.values()):
        for name, call in calls.items():
            call()  # brings this session's weights back into the cache
            for _ in range(BLOCK):
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(measured) for name, measured in times.items()}
