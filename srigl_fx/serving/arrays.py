"""Arrays in JSON: those of a request, checked against what a file takes, and outputs as they are sent.

Owns that translation. A request is untrusted: nothing in it becomes another kind of number. It must not know who asks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import HTTPException

from srigl_fx.onnx_export.tensor_types import DTYPES
from srigl_fx.serving.batcher import MOST_WORDS, Array, sample_inputs

if TYPE_CHECKING:
    import onnxruntime


def arrays(session: "onnxruntime.InferenceSession", given: Any, max_batch: int) -> dict[str, Array]:
    """A request's arrays, checked against what the file takes.

    Raises:
        HTTPException: 422; the message names the input and says what is wrong.
    """
    inputs = session.get_inputs()
    wanted = {entry.name: entry for entry in inputs}
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        raise HTTPException(422, f'"inputs" must be an object with the names {", ".join(sorted(wanted))}')
    feeds = {name: _array(name, given[name], entry) for name, entry in wanted.items()}
    leading = sample_inputs(inputs)
    rows = {len(feeds[name]) for name in leading}
    if rows and (len(rows) != 1 or not 1 <= min(rows) <= max_batch):
        raise HTTPException(
            422,
            f"{', '.join(leading)} must hold the same number of samples, 1 to {max_batch}, not {sorted(rows)}",
        )
    _check_names(feeds, inputs)
    return feeds


def _check_names(feeds: Mapping[str, Array], inputs: Sequence[Any]) -> None:
    """Sizes of one name are equal: what a model does with others is anything."""
    known: dict[str, tuple[int, str]] = {}
    for entry in inputs:
        for size, name in zip(feeds[entry.name].shape, entry.shape, strict=True):
            if not isinstance(name, str):
                continue
            first, where = known.setdefault(name, (size, entry.name))
            if size != first:
                raise HTTPException(
                    422, f"the size {name!r} is {size} in input {entry.name!r} and {first} in input {where!r}"
                )


def _array(name: str, given: Any, entry: Any) -> Array:
    """One input as an array of the file's type: whole numbers may become floats, and nothing else another kind."""
    dtype = np.dtype(DTYPES[entry.type])
    kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    try:
        found = np.asarray(given)
    except ValueError as error:  # lists of unequal lengths
        raise HTTPException(422, f"input {name!r} is no array: {str(error)[:MOST_WORDS]}") from error
    # Beside numbers, true and false are taken for 1 and 0.
    mixed = dtype.kind != "b" and found.size and bool in set(map(type, np.asarray(given, object).flat))
    if found.size and (found.dtype.kind not in kinds or mixed):
        raise HTTPException(422, f"input {name!r} is no array of {entry.type}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    kept = array == found if dtype.kind in "iu" else np.isfinite(array) | ~np.isfinite(found)
    if not kept.all():
        raise HTTPException(422, f"input {name!r} has numbers that no {entry.type} holds")
    sizes = zip(array.shape, entry.shape, strict=False)
    fits = all(not isinstance(size, int) or size == got for got, size in sizes)
    if array.ndim != len(entry.shape) or not fits:
        raise HTTPException(422, f"input {name!r} has the shape {array.shape}, and the file takes {entry.shape}")
    return array


def listed(array: Array) -> Any:
    """An output as JSON holds it: numbers that are not finite are null."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        objects = array.astype(object)
        objects[~np.isfinite(array)] = None
        return objects.tolist()
    return array.tolist()
