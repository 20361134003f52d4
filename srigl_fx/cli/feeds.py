"""Random inputs for an ONNX file of which nothing is known but what it takes.

Owns which size each axis has. It must not know what the inputs are for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srigl_fx.errors import FormatError
from srigl_fx.onnx_condensing.trial import sum_of
from srigl_fx.onnx_export.tensor_types import DTYPES

Feeds = dict[str, NDArray[Any]]
USUAL = 64  # of a free size, such as the number of tokens


def batch_of(inputs: Sequence[Any]) -> int | None:
    """The batch size that a file fixes, the leading size of its first input; None where that is free.

    Args:
        inputs: What ``session.get_inputs()`` says.
    """
    size = next((entry.shape[0] for entry in inputs if entry.shape), None)
    return size if isinstance(size, int) else 1 if size is None and not any(entry.shape for entry in inputs) else None


def feeds_for(inputs: Sequence[Any], batch: int, sizes: Mapping[str, int]) -> tuple[Feeds, dict[str, int]]:
    """Arrays for every input, and which sizes were free beside the batch: random floats, and ones for the rest.

    The batch is the leading size of the first input, and each size of the same name. A size that is named as a sum of
    others ("past + tokens") is theirs.

    Args:
        inputs: What ``session.get_inputs()`` says.
        batch: The batch size.
        sizes: Others, by their names; by default 64, or the sum.

    Raises:
        FormatError: An input is no tensor of numbers, or a size is asked for that the file has not free, or that is the
            batch.
    """
    if odd := [entry for entry in inputs if entry.type not in DTYPES]:
        raise FormatError(f"the input {odd[0].name!r} is a {odd[0].type}, for which there are no random numbers")
    named = {size for entry in inputs for size in entry.shape if isinstance(size, str)}
    if unknown := sorted(sizes.keys() - named):
        raise FormatError(
            f"the file has no free size {unknown[0]!r}; those that it has: {', '.join(sorted(named)) or 'none'}"
        )
    leading = next((entry.shape[0] for entry in inputs if entry.shape), None)
    if leading in sizes:
        raise FormatError(f"the size {leading!r} is the batch size: give it as that, with --batch")
    known: dict[str, int] = {**dict.fromkeys(named, USUAL), str(leading): batch, **sizes}
    used: dict[str, int] = {}

    def size_of(axis: int, size: int | str | None) -> int:
        if isinstance(size, int):
            return size
        if size is None:  # free, without a name
            return USUAL if axis else batch
        if size == leading:
            return batch
        total = sum_of(size, known)
        used[size] = sizes.get(size, USUAL if total is None else total)
        return used[size]

    rng, feeds = np.random.default_rng(0), {}
    for entry in inputs:
        shape = [size_of(axis, size) for axis, size in enumerate(entry.shape)]
        dtype = np.dtype(DTYPES[entry.type])
        feeds[entry.name] = (rng.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)).astype(dtype)
    return feeds, used
