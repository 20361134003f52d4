"""What the kept weights can be stored in: one row for each dtype.

Owns the list. The format, the kernels, the operators of torch and of ONNX Runtime, and tests read it; how stored values
become float32 is the kernels' (:mod:`srigl_fx.runtime.cpu.kernels.values`). It must not know kernels; importing it
imports neither torch nor Numba.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np

from srigl_fx.runtime.quantisation import LARGEST_VALUE

ValueDtype = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class ValueType:
    """One dtype of stored values.

    Attributes:
        name: What torch calls it, and the kernels' functions that read it.
        numpy: The dtype of an array of them.
        onnx: ONNX's number of the element type.
        onnx_type: ONNX's name of a tensor of them.
        scaled: Whether they are whole numbers, with a scale for each row, and are multiplied with activations that are
            rounded as well (:mod:`srigl_fx.runtime.quantisation`).
    """

    name: ValueDtype
    numpy: np.dtype[Any]
    onnx: int
    onnx_type: str
    scaled: bool = False


# A number is a position here.
VALUE_TYPES: Final = (
    ValueType(name="float32", numpy=np.dtype(np.float32), onnx=1, onnx_type="tensor(float)"),
    # NumPy has no bfloat16 of its own.
    ValueType(name="bfloat16", numpy=np.dtype(ml_dtypes.bfloat16), onnx=16, onnx_type="tensor(bfloat16)"),
    ValueType(name="float16", numpy=np.dtype(np.float16), onnx=10, onnx_type="tensor(float16)"),
    ValueType(name="int8", numpy=np.dtype(np.int8), onnx=3, onnx_type="tensor(int8)", scaled=True),
)
NAMES: Final = tuple(row.name for row in VALUE_TYPES)
FLOATS: Final = tuple(row.name for row in VALUE_TYPES if not row.scaled)
NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}


def choice(among: Sequence[str] = NAMES, prefix: str = "") -> str:
    """Names as messages list them.

    Example:
        >>> choice(), choice(FLOATS[:2])
        ('float32, bfloat16, float16 or int8', 'float32 or bfloat16')
    """
    names = [prefix + name for name in among]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def as_markdown() -> str:
    """The dtypes of values as the table of docs/kernels.md.

    Example:
        >>> print(as_markdown().splitlines()[3])
        | `bfloat16` | 2 | `tensor(bfloat16)` | 3.9e-03 |
    """
    lines = ["| dtype | bytes a weight | in ONNX files | largest rounding |", "|---|---|---|---|"]
    for row in VALUE_TYPES:
        finfo: Any = ml_dtypes.finfo
        if row.scaled:
            error = f"{1 / (2 * LARGEST_VALUE):.1e} of the largest in its row"
        else:
            error = "none" if row.name == "float32" else f"{float(finfo(row.numpy).eps) / 2:.1e}"
        lines.append(f"| `{row.name}` | {row.numpy.itemsize} | `{row.onnx_type}` | {error} |")
    return "\n".join(lines)
