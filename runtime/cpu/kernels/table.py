"""What kernels there are: one row for each.

Owns the list, from which the operator library takes its symbols, the tests what they must run, and the documentation
its table. It must not know how a kernel works, nor which one a call takes, as :mod:`srigl_fx.runtime.cpu.kernels.plan`
says. Plain Python: importing it does not import Numba.
"""

from dataclasses import dataclass
from typing import Final, Literal

from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import AVX2, AVX512, EVERY_ISA, NEON, level_of
from srigl_fx.runtime.value_types import FLOATS as VALUES


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
        task: The function of :mod:`srigl_fx.runtime.cpu.kernels.tasks` that runs a share of a call.
        layer: The kind of layer that it computes; "training" for the products of a training step, which are no part of
            the operator library.
        number: What the plan calls it, where the plan has it to choose.
        computes: How, in a phrase.
        reads: The form of the weight: the canonical format, or a packed one.
        values: The dtypes of stored values; sums are float32, and of whole numbers int32.
        isas: The instruction sets that have it.
        samples: The fewest and the most samples of a call that takes it; None for any number.
        feature_major: Whether it reads and writes feature-major tensors too.
        file: Where it is, in ``runtime/cpu/kernels``.
    """

    task: str
    layer: Literal["linear", "convolution", "training"]
    number: int = -1
    computes: str
    reads: Literal[
        "canonical",
        "dot panel",
        "tile panel",
        "shared tile panel",
        "sample panel",
        "int8 dot panel",
        "int8 tile panel",
        "rows in blocks",
    ]
    values: tuple[str, ...] = VALUES
    isas: tuple[str, ...] = EVERY_ISA
    samples: tuple[int, int | None] = (1, None)
    feature_major: bool = False
    file: str


KERNELS: Final = (
    Kernel(
        task="rows_task",
        layer="linear",
        number=plan.ROWS,
        computes="weight by weight; where no panel fits or may be kept, and for one sample without another kernel",
        reads="canonical",
        file="linear_tasks.py",
    ),
    Kernel(
        task="strided_task",
        layer="linear",
        number=plan.STRIDED,
        computes="weight by weight, between tensors that are feature-major; in ONNX Runtime only",
        reads="canonical",
        feature_major=True,
        file="linear_tasks.py",
    ),
    Kernel(
        task="dot_task",
        layer="linear",
        number=plan.DOT,
        computes="inputs are looked up in vector registers, 16 rows at a time; AVX2, NEON: one or two samples, loaded",
        reads="dot panel",
        isas=(AVX2, AVX512, NEON),
        samples=(1, plan.most_dot_samples(level_of(AVX512))),
        file="dot.py",
    ),
    Kernel(
        task="tile_task",
        layer="linear",
        number=plan.TILE,
        computes="32 samples side by side: one broadcast multiply-add for each kept weight and 16 samples",
        reads="tile panel",
        feature_major=True,
        file="tile.py",
    ),
    Kernel(
        task="shared_tile_task",
        layer="linear",
        number=plan.SHARED_TILE,
        computes="the tile kernel for rows that share their inputs, four at a time: inputs are loaded once",
        reads="shared tile panel",
        feature_major=True,
        file="tile.py",
    ),
    Kernel(
        task="int8_dot_task",
        layer="linear",
        number=plan.INT8_DOT,
        computes="activations rounded to bytes; four products of bytes at once; inputs are looked up (VBMI) or loaded",
        reads="int8 dot panel",
        values=("int8",),
        samples=(1, plan.MOST_INT8_DOT_SAMPLES),
        file="int8.py",
    ),
    Kernel(
        task="int8_tile_task",
        layer="linear",
        number=plan.INT8_TILE,
        computes="16 to 64 samples side by side as bytes: four kept weights at once; shared inputs laid out once",
        reads="int8 tile panel",
        values=("int8",),
        feature_major=True,
        file="int8_rows.py",
    ),
    Kernel(
        task="conv_rows_task",
        layer="convolution",
        number=plan.ROWS,
        computes="weight by weight over a padded copy; fewer than 16 filters a group",
        reads="canonical",
        file="conv.py",
    ),
    Kernel(
        task="conv_tile_task",
        layer="convolution",
        number=plan.TILE,
        computes="the tile kernel with 32 output positions in place of samples; padding is never stored",
        reads="tile panel",
        file="tile.py, patches.py",
    ),
    Kernel(
        task="conv_shared_tile_task",
        layer="convolution",
        number=plan.SHARED_TILE,
        computes="the same for filters that share their inputs, four at a time",
        reads="shared tile panel",
        file="tile.py, patches.py",
    ),
    Kernel(
        task="conv_innermost_task",
        layer="convolution",
        number=plan.INNERMOST,
        computes="between tensors with 8 samples innermost, or 16 with AVX-512: inputs are read where they lie, at four"
        " positions at once, or for four rows that share them",
        reads="sample panel",
        samples=(8, None),
        file="innermost.py",
    ),
    Kernel(
        task="int8_conv_task",
        layer="convolution",
        number=plan.INT8_TILE,
        computes="the tile kernel of bytes with 64 output positions in place of samples, from a padded copy",
        reads="int8 tile panel",
        values=("int8",),
        file="int8_rows.py, conv.py",
    ),
    Kernel(
        task="product_task",
        layer="training",
        computes="64 samples side by side, any pattern; the outputs and the gradient of the inputs",
        reads="rows in blocks",
        values=("float32",),
        file="chunks.py",
    ),
    Kernel(
        task="value_gradient_task",
        layer="training",
        computes="a dense product sampled at the kept weights: their gradient",
        reads="rows in blocks",
        values=("float32",),
        file="value_gradient.py",
    ),
)

# What the callers of kernels need besides: the plan itself, packing, and the preparation of a convolution.
HELPERS: Final = (
    *("measure_panel", "fill_panel", "plan_linear", "plan_panel"),
    *("conv_plan", "conv_offsets", "conv_pack_task", "widen_values"),
    *("int8_scales_task", "int8_pack_task", "int8_fill_task", "int8_round_task"),
    *("arrange_task", "pool_samples_task", "pool_rest_task", "place_task", "affine_task"),
)
TASKS: Final = (*(kernel.task for kernel in KERNELS if kernel.layer != "training"), *HELPERS)
# What is compiled for each of the targets; all else for the instruction sets that they extend.
BYTE_TASKS: Final = (*(kernel.task for kernel in KERNELS if kernel.values == ("int8",)), "plan_linear", "plan_panel")
TORCH_TASKS: Final = (
    "pack_task",
    *(kernel.task for kernel in KERNELS if kernel.layer == "training"),
    *("serial_task", "team_task"),
)


def as_markdown() -> str:
    """The kernels as the table of docs/kernels.md.

    Example:
        >>> print(as_markdown().splitlines()[4].split(" | ")[:2])
        ['| linear', '1 to 5']
    """
    lines = ["| layer | samples | how | reads | values | instruction sets | file |", "|---|---|---|---|---|---|---|"]
    for kernel in KERNELS:
        least, most = kernel.samples
        samples = "any" if most is None else f"{least} to {most}"
        isas = "all" if kernel.isas == EVERY_ISA else ", ".join(kernel.isas)
        layer = f"{kernel.layer}, also feature-major" if kernel.feature_major else kernel.layer
        values = "floats" if kernel.values == VALUES else ", ".join(kernel.values)
        lines.append(
            f"| {layer} | {samples} | {kernel.computes} | {kernel.reads} | {values} | {isas} | `{kernel.file}` |"
        )
    return "\n".join(lines)
