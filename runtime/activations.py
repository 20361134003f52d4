"""The activations that a condensed operator can apply to its outputs: one row for each.

Owns the list, and what each row says but the kernel's arithmetic, which is the function of the same name in
:mod:`srigl_fx.runtime.cpu.kernels.activations`. Numbers, names of ONNX operators, fallbacks, references, gradients, the
pass that takes an activation into the operator before it, and tests are made from it. It must not know kernels;
importing it imports neither torch nor Numba.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation.

    Attributes:
        name: What torch's operators call it, and the kernels' function of one float32.
        suffix: How the ONNX operators that apply it end.
        reference: What it computes, by NumPy.
        onnx: The same as ONNX nodes from ``{x}`` to ``{y}``, of opset 18; constants are tensors that state their type.
        aten: The ATen operator that it is, which is also a function of torch or of ``torch.nn.functional``.
        settings: That operator's arguments beside its input.
        limits: The least and the greatest result, of an activation that does nothing but limit its input.
    """

    name: str
    suffix: str
    reference: Callable[[Array], Array]
    onnx: str
    aten: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[float, float] | None = None


# A number is a position here: files and built libraries count on the order, so that rows are added at the end.
ACTIVATIONS: Final = (
    Activation(
        name="none",
        suffix="",
        reference=lambda y: y,
        onnx="",
        aten="",
        limits=(-math.inf, math.inf),
    ),
    Activation(
        name="relu",
        suffix="Relu",
        reference=lambda y: np.maximum(y, 0),
        onnx="{y} = Relu ({x})",
        aten="relu",
        limits=(0.0, math.inf),
    ),
    Activation(
        name="relu6",
        suffix="Relu6",
        reference=lambda y: np.clip(y, 0, 6),
        onnx="""
    low = Constant <value: tensor = float {{0.0}}> ()
    high = Constant <value: tensor = float {{6.0}}> ()
    {y} = Clip ({x}, low, high)
""",
        aten="relu6",
        limits=(0.0, 6.0),
    ),
    Activation(
        name="gelu",
        suffix="Gelu",
        reference=lambda y: y * (1 + _erf(y / math.sqrt(2))) / 2,
        onnx="""
    root_two = Constant <value: tensor = float {{1.4142135623730951}}> ()
    half = Constant <value: tensor = float {{0.5}}> ()
    unit = Constant <value: tensor = float {{1.0}}> ()
    scaled = Div ({x}, root_two)
    erf = Erf (scaled)
    raised = Add (erf, unit)
    weighted = Mul ({x}, raised)
    {y} = Mul (weighted, half)
""",
        aten="gelu",
        settings={"approximate": "none"},
    ),
    Activation(
        name="gelu_tanh",
        suffix="GeluTanh",
        reference=lambda y: y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2,
        onnx="""
    root_two_by_pi = Constant <value: tensor = float {{0.7978845608028654}}> ()
    cubic = Constant <value: tensor = float {{0.044715}}> ()
    half = Constant <value: tensor = float {{0.5}}> ()
    unit = Constant <value: tensor = float {{1.0}}> ()
    squared = Mul ({x}, {x})
    bent = Mul (squared, cubic)
    factor = Add (bent, unit)
    straight = Mul ({x}, root_two_by_pi)
    scaled = Mul (straight, factor)
    tanh = Tanh (scaled)
    raised = Add (tanh, unit)
    halved = Mul ({x}, half)
    {y} = Mul (halved, raised)
""",
        aten="gelu",
        settings={"approximate": "tanh"},
    ),
    Activation(
        name="silu",
        suffix="Silu",
        reference=lambda y: y / (1 + np.exp(-y)),
        onnx="""
    gate = Sigmoid ({x})
    {y} = Mul ({x}, gate)
""",
        aten="silu",
    ),
    Activation(
        name="hardswish",
        suffix="Hardswish",
        reference=lambda y: y * np.clip(y + 3, 0, 6) / 6,
        onnx="{y} = HardSwish ({x})",
        aten="hardswish",
    ),
    Activation(
        name="tanh",
        suffix="Tanh",
        reference=np.tanh,
        onnx="{y} = Tanh ({x})",
        aten="tanh",
    ),
    Activation(
        name="sigmoid",
        suffix="Sigmoid",
        reference=lambda y: 1 / (1 + np.exp(-y)),
        onnx="{y} = Sigmoid ({x})",
        aten="sigmoid",
    ),
)
NAMES: Final = tuple(row.name for row in ACTIVATIONS)
NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}


def as_markdown() -> str:
    """The activations as the table of docs/kernels.md.

    Example:
        >>> print(as_markdown().splitlines()[2])
        | `relu` | `relu` | `Relu` | while a sum is in registers |
    """
    lines = ["| activation | ATen operator | in an ONNX operator's name | applied |", "|---|---|---|---|"]
    for row in ACTIVATIONS[1:]:
        settings = "".join(f", {name}={value!r}" for name, value in row.settings.items())
        when = "to the finished tile or row" if row.limits is None else "while a sum is in registers"
        lines.append(f"| `{row.name}` | `{row.aten}{settings}` | `{row.suffix}` | {when} |")
    return "\n".join(lines)
