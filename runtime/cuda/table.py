"""What CUDA kernels there are: one row for each, and what each is given.

Owns the list, from which machine code is built, calls are packed, tests take what they must run, and the documentation
its table. It must not know how a kernel works. Plain Python: importing it imports no compiler.
"""

from dataclasses import dataclass
from typing import Final

from srigl_fx.runtime.value_types import FLOATS

# Of each kernel's arguments, in their order: pointers to what, then int32 numbers, then two float32, the limits.
_TENSORS: Final = ("bias:float32", "residual:float32", "y:float32")
_SIZES: Final = ("batch", "in_features", "n", "n_active")
_EPILOGUE: Final = ("has_residual", "activation")
LIMITS: Final = ("low", "high")
VALUE: Final = "value"  # stands for the dtype of stored values


@dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """One kernel, in one variant; each exists for every dtype of values that are floats.

    Attributes:
        name: What files and symbols call it.
        family: The function that makes it: ``rows``, ``vector`` or ``tile``.
        settings: What that function takes beside the dtype.
        pointers: Its arguments that are pointers, with the dtypes of what they point to.
        numbers: Its arguments that are int32.
        threads: Of a block.
        registers: The most that the design allows a thread; the tests hold the machine code to it.
        blocks: The blocks that should fit on a multiprocessor side by side, by registers.
        loads: Widths in bytes of the vector loads that its inner loop must have, of weights with float32 values.
        samples: The fewest and the most samples of a call that takes it; None for any number.
        computes: How, in a phrase.
        reads: The form of the weight.
    """

    name: str
    family: str
    settings: tuple[int, ...] = ()
    pointers: tuple[str, ...]
    numbers: tuple[str, ...]
    threads: int = 256
    registers: int
    blocks: int
    loads: tuple[int, ...] = (8, 16)
    samples: tuple[int, int | None]
    computes: str
    reads: str

    def signature(self, dtype: str) -> tuple[str, ...]:
        """The types of all arguments: dtypes with a star for pointers to them, else of numbers.

        Example:
            >>> KERNELS[1].signature("bfloat16")[:3], KERNELS[1].signature("bfloat16")[-3:]
            (('float32*', 'bfloat16*', 'uint16*'), ('int32', 'float32', 'float32'))
        """
        pointed = [pointer.partition(":")[2].replace(VALUE, dtype) for pointer in self.pointers]
        return (*(f"{kind}*" for kind in pointed), *("int32" for _ in self.numbers), *("float32" for _ in LIMITS))

    def symbol(self, dtype: str) -> str:
        """The name of its machine code for values of this dtype.

        Example:
            >>> KERNELS[1].symbol("float16")
            'vector1_float16'
        """
        return f"{self.name}_{dtype}"


def _rows(index: str) -> CudaKernel:
    return CudaKernel(
        name=f"rows_{index}",
        family="rows",
        pointers=("x:float32", "values:value", f"indices:{index}", "active:int32", "reads:int32", *_TENSORS),
        numbers=(*_SIZES, "k", "shared", *_EPILOGUE),
        registers=48,
        blocks=5,
        loads=(),
        samples=(1, None),
        computes="a warp for each output and sample; where no packed copy may be kept",
        reads="canonical",
    )


def _vector(samples: int, least: int, most: int) -> CudaKernel:
    return CudaKernel(
        name=f"vector{samples}",
        family="vector",
        settings=(samples,),
        pointers=("x:float32", "values:value", "offsets:uint16", "rows:int32", *_TENSORS),
        numbers=(*_SIZES, "k", "shift", "by_four", *_EPILOGUE),
        threads=512,
        registers=64,
        blocks=2,
        samples=(least, most),
        computes=f"lanes share a row, {samples} {'sample' if samples == 1 else 'samples'} at once in shared memory",
        reads="rows of fours",
    )


def _tile(samples: int, outputs: int, registers: int, blocks: int) -> CudaKernel:
    return CudaKernel(
        name=f"tile{samples}x{outputs}",
        family="tile",
        settings=(samples, outputs),
        pointers=("x:float32", "values:value", "offsets:uint16", "starts:int32", "rows:int32", *_TENSORS),
        numbers=(*_SIZES, "window", "x_columns", "y_columns", *_EPILOGUE),
        registers=registers,
        blocks=blocks,
        loads=(8, 16),
        samples=(1, None),
        computes=f"a window of inputs of {32 * samples} samples in shared memory; {outputs} outputs and {samples} "
        f"{'sample' if samples == 1 else 'samples'} a thread",
        reads="windows of rows",
    )


KERNELS: Final = (
    _rows("uint16"),
    _vector(1, 1, 1),
    _vector(4, 2, 16),
    _tile(1, 4, 64, 4),
    _tile(2, 8, 80, 3),
    _tile(4, 16, 128, 2),
    _rows("int32"),
)
BY_NAME: Final = {kernel.name: kernel for kernel in KERNELS}
VALUES: Final = FLOATS


def as_markdown() -> str:
    """The kernels as the table of docs/kernels.md.

    Example:
        >>> as_markdown().splitlines()[3].split(" | ")[:2]
        ['| `vector1`', '1']
    """
    lines = ["| kernel | samples | how | reads | threads | registers |", "|---|---|---|---|---|---|"]
    for kernel in KERNELS:
        least, most = kernel.samples
        samples = f"{least} and more" if most is None else str(least) if least == most else f"{least} to {most}"
        lines.append(
            f"| `{kernel.name}` | {samples} | {kernel.computes} | {kernel.reads} | {kernel.threads} | "
            f"{kernel.registers} at most |"
        )
    return "\n".join(lines)
