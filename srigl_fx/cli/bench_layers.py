"""Condensed against dense linear layers, in float32 and in int8, on this machine.

Owns the layers, the measurement and its table; it must not know the kernels: it calls the public operator.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch

from srigl_fx.cli.timing import medians
from srigl_fx.errors import SriglError
from srigl_fx.reports.text_tables import format_table
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.value_types import NAMES, choice

Shape = tuple[int, int]
DEFAULT_SHAPES: tuple[Shape, ...] = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
SECONDS = 0.4  # for each comparison
LARGEST = 2**15  # inputs or outputs; a dense layer of that size takes 4 GiB


def parse_shape(text: str) -> Shape:
    """Read ``"768x3072"`` as (inputs, outputs).

    Raises:
        SriglError: If it is not two positive numbers with an x between them.

    Example:
        >>> parse_shape("768x3072")
        (768, 3072)
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) <= LARGEST for part in parts):
        raise SriglError(
            f"cannot read the shape {text!r}: write INPUTSxOUTPUTS, such as 768x3072, up to {LARGEST} each"
        )
    return int(parts[0]), int(parts[1])


@dataclass(frozen=True, kw_only=True)
class LayerCell:
    """One layer at one sparsity and one batch size; seconds are medians of one call.

    Attributes:
        inputs: Of the layer.
        outputs: Of the layer.
        sparsity: The fraction removed.
        batch: Rows of the input.
        dense: Seconds of PyTorch or ONNX Runtime, whichever is faster.
        dense_int8: Seconds of what ONNX Runtime's ``quantize_dynamic`` makes of the layer.
        condensed: Seconds of ours.
    """

    inputs: int
    outputs: int
    sparsity: float
    batch: int
    dense: float
    dense_int8: float
    condensed: float


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """What was measured; ``str()`` is a table."""

    cells: tuple[LayerCell, ...]
    threads: int
    value_dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        measured = ("dense us", "dense int8 us", "condensed us", "dense / condensed", "dense int8 / condensed")
        headers = ("inputs", "outputs", "sparsity", "batch", *measured)
        rows = [
            (
                *(cell.inputs, cell.outputs, f"{cell.sparsity:.0%}", cell.batch),
                *(f"{1e6 * seconds:.1f}" for seconds in (cell.dense, cell.dense_int8, cell.condensed)),
                *(f"{seconds / cell.condensed:.2f}" for seconds in (cell.dense, cell.dense_int8)),
            )
            for cell in self.cells
        ]
        note = (
            f"Median of one call, {self.threads} thread{'s' * (self.threads > 1)}. Dense: the faster of PyTorch and "
            "ONNX Runtime; dense int8: ONNX Runtime's quantize_dynamic.\n"
            f"Condensed: in PyTorch, values in {self.value_dtype}. Above 1, condensed is faster."
        )
        return format_table(headers, rows, right=range(len(headers))) + "\n" + note


def compare(
    shapes: Sequence[Shape],
    sparsities: Sequence[float],
    batches: Sequence[int],
    *,
    threads: int = 1,
    value_dtype: str = "float32",
    done: Callable[[], None] = lambda: None,
) -> LayerTimes:
    """Median times, dense and condensed in turns; slower cases are shown like all others.

    Dense is PyTorch or ONNX Runtime, whichever is faster in the cell; dense int8 is what ONNX Runtime's
    ``quantize_dynamic`` makes of the layer, which takes no training either.

    Args:
        shapes: Layers as (inputs, outputs).
        sparsities: Fractions removed, in [0, 1).
        batches: Rows of the input.
        threads: Of each of them.
        value_dtype: What the condensed layer stores its values in.
        done: Called after each cell.

    Raises:
        SriglError: If a sparsity or a batch size is out of range, or there is no such dtype.

    Example:
        >>> print(str(compare([(64, 32)], [0.75], [1])).splitlines()[0].split()[4:11])
        ['dense', 'us', 'dense', 'int8', 'us', 'condensed', 'us']
    """
    if not all(0 <= sparsity < 1 for sparsity in sparsities) or not all(batch >= 1 for batch in batches):
        raise SriglError("a sparsity must lie in [0, 1), such as 0.9, and a batch size must be at least 1")
    if value_dtype not in NAMES:
        raise SriglError(f"values are stored in {choice()}, not in {value_dtype!r}")
    cells = []
    # Not in inference mode: PyTorch counts no writes to what is made in it, so that a weight is packed at each call.
    with torch_threads(threads), torch.no_grad():
        for (inputs, outputs), sparsity, batch in itertools.product(shapes, sparsities, batches):
            times = _measure(inputs, outputs, sparsity, batch, value_dtype, threads)
            cells.append(
                LayerCell(
                    inputs=inputs,
                    outputs=outputs,
                    sparsity=sparsity,
                    batch=batch,
                    dense=min(times["torch"], times["onnxruntime"]),
                    dense_int8=times["int8"],
                    condensed=times["ours"],
                )
            )
            done()
    return LayerTimes(cells=tuple(cells), threads=threads, value_dtype=value_dtype)


def _measure(
    inputs: int, outputs: int, sparsity: float, batch: int, value_dtype: str, threads: int
) -> dict[str, float]:
    import srigl_fx.runtime.ops  # noqa: F401 - registers torch.ops.srigl_fx
    from srigl_fx.demo.dense_int8 import dynamic_int8
    from srigl_fx.passes.condense import values_of
    from srigl_fx.runtime.format import CondensedWeight, ValueDtype

    rng = np.random.default_rng(0)
    fan_in = max(1, round((1 - sparsity) * inputs))
    mask = np.zeros((outputs, inputs), np.bool_)
    np.put_along_axis(mask, rng.random(mask.shape).argpartition(fan_in - 1, axis=1)[:, :fan_in], True, axis=1)
    weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
    dtype = cast("ValueDtype", value_dtype)
    condensed = CondensedWeight.from_dense(weight, mask, rng.standard_normal(outputs), dtype=dtype)

    x, dense, bias = torch.randn(batch, inputs), torch.from_numpy(weight), torch.from_numpy(condensed.bias)
    operands = [values_of(condensed), *map(torch.from_numpy, (condensed.indices, condensed.active))]
    scales = None if condensed.scales is None else torch.from_numpy(condensed.scales)
    model, feeds = _dense_onnx(weight, condensed.bias), {"x": x.numpy()}
    whole, int8 = (_session(content, threads) for content in (model, dynamic_int8(model)))
    return medians(
        {
            "torch": lambda: torch.nn.functional.linear(x, dense, bias),
            "onnxruntime": lambda: whole.run(None, feeds),
            "int8": lambda: int8.run(None, feeds),
            "ours": lambda: torch.ops.srigl_fx.condensed_linear(x, *operands, bias, inputs, scales=scales),
        },
        seconds=SECONDS,
    )


def _dense_onnx(weight: np.ndarray, bias: np.ndarray) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["sum"]), helper.make_node("Add", ["sum", "bias"], ["y"])],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])],
        [
            numpy_helper.from_array(np.ascontiguousarray(weight.T), "weight"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
