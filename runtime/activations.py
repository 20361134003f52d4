"""The activations that a condensed operator can apply to its outputs: one row for each.

Owns the list, and all that is said of an activation but the arithmetic of one that has no ``limits``, which is the
function of the same name in :mod:`srigl_fx.runtime.cpu.kernels.activations`. Numbers, names of ONNX operators,
fallbacks, references, gradients, the pass that takes an activation into the operator before it, and tests are made from
it. It must not know kernels; importing it imports neither torch nor Numba.

Rows are checked when the module is imported; what they say of torch's operators, by :mod:`srigl_fx.runtime.dense`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from srigl_fx.errors import SriglError

Array = NDArray[Any]
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation.

    Attributes:
        name: What torch's operators call it; and, where it has no ``limits``, the kernels' function of one float32.
        suffix: How the ONNX operators that apply it end.
        reference: What it computes, by NumPy.
        onnx: The same as ONNX nodes from ``{x}`` to ``{y}``, of opset 18; constants are tensors that state their type.
        aten: The ATen operator that it is, of one tensor, element by element.
        settings: All of that operator's arguments beside its input.
        limits: The least and the greatest result, of an activation that does nothing but limit its input: the kernels
            need no more of it.

    Raises:
        SriglError: A value is not what it must be; the message says which, and how to mend it.

    Example:
        >>> Activation(name="hard tanh", suffix="", reference=np.tanh, onnx="", aten="hardtanh")
        Traceback (most recent call last):
        srigl_fx.errors.SriglError: the activation 'hard tanh': name and suffix must be of letters, digits and _
    """

    name: str
    suffix: str
    reference: Callable[[Array], Array]
    onnx: str
    aten: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise SriglError(f"the activation {self.name!r}: {problem}")

    def _problem(self) -> str:
        """What is wrong with the row; "" if nothing."""
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            return f"limits must be the least and the greatest result, not {self.limits}"
        if not self.aten:
            return "" if self.name == "none" else "aten must name an ATen operator"
        if not self.name.isidentifier() or not self.suffix.isidentifier():
            return "name and suffix must be of letters, digits and _"
        try:
            nodes = [self.onnx.format(x=x, y="y") for x in ("a", "b")]
        except (LookupError, ValueError) as error:
            return f"onnx must have {{x}}, {{y}} and, for other braces, {{{{ and }}}} ({type(error).__name__}: {error})"
        if nodes[0] == nodes[1] or nodes[0] == self.onnx.format(x="a", y="z"):
            return "onnx must be nodes from {x} to {y}"
        return ""


def checked(rows: tuple[Activation, ...]) -> tuple[Activation, ...]:
    """The same rows.

    Raises:
        SriglError: Two of them have one name or one suffix, by which files tell them apart.

    Example:
        >>> checked(ACTIVATIONS) is ACTIVATIONS
        True
    """
    for what in ("name", "suffix"):
        given = [getattr(row, what) for row in rows]
        if twice := [one for i, one in enumerate(given) if one in given[:i]]:
            raise SriglError(f"two activations have the {what} {twice[0]!r}: each row needs one of its own")
    return rows


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
NAMES: Final = tuple(row.name for row in checked(ACTIVATIONS))
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
