"""State between the calls of a session: how a file says what it starts with, and who carries it.

Owns the entry of a file's metadata, and :class:`Stream`. It must not know how files are made.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from srigl_fx.errors import FormatError

if TYPE_CHECKING:
    import onnxruntime

KEY = "srigl_fx.state"
INPUT, OUTPUT = "state.", "next_state."
_LARGEST = 1 << 32  # bytes of one initial state: more is no honest file


def encode(state: "Mapping[str, np.ndarray[Any, Any]]") -> str:
    """The entry that says which state a file has and what it is before the first call, by the buffers' names.

    Example:
        >>> decode(encode({"total": np.zeros((1, 2), np.float32)}))
        {'total': array([[0., 0.]], dtype=float32)}
    """
    return json.dumps(
        [
            {
                "name": name,
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "zlib": base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes())).decode("ascii"),
            }
            for name, value in state.items()
        ]
    )


def decode(text: str) -> "dict[str, np.ndarray[Any, Any]]":
    """What :func:`encode` was given; raises many things on bad data."""
    state = {}
    for entry in json.loads(text):
        dtype, shape = np.dtype(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        if dtype.kind not in "biuf" or any(size < 0 for size in shape):
            raise ValueError(f"a state of type {dtype} and shape {shape}")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size > _LARGEST:
            raise ValueError(f"a state of {size} bytes")
        unpacked = zlib.decompressobj().decompress(base64.b64decode(entry["zlib"], validate=True), size + 1)
        if len(unpacked) != size:
            raise ValueError(f"a state of shape {shape} in {len(unpacked)} bytes")
        state[str(entry["name"])] = np.frombuffer(unpacked, dtype).reshape(shape).copy()
    return state


class Stream:
    """One stream of calls on a session, which carries the state of the model from each call to the next.

    For each buffer ``name`` that the model writes, the file takes ``state.name`` and returns ``next_state.name``.
    Several streams may share a session, each with a state of its own; one stream belongs to one thread at a time. Of a
    file without state, a stream is the session.

    Attributes:
        state: What the next call starts with, by the buffers' names; may be kept, and set again.

    Example:
        >>> session = sx.runtime.load("model.onnx")  # doctest: +SKIP
        >>> stream = Stream(session)  # doctest: +SKIP
        >>> outputs = [stream.run(None, {"x": chunk}) for chunk in chunks]  # doctest: +SKIP
    """

    def __init__(self, session: "onnxruntime.InferenceSession") -> None:
        """Begin with the state that the model had when it was exported.

        Raises:
            FormatError: The file does not describe its state rightly.
        """
        self._session = session
        text = session.get_modelmeta().custom_metadata_map.get(KEY, "[]")
        try:
            self._initial = decode(text)
        except Exception as error:  # the file is untrusted: anything
            raise FormatError(f"the file's state is malformed ({error}); export the model anew") from error
        outputs = [value.name for value in session.get_outputs()]
        inputs = {value.name for value in session.get_inputs()}
        missing = [name for name in self._initial if INPUT + name not in inputs or OUTPUT + name not in outputs]
        if missing:
            raise FormatError(f"the file has no inputs and outputs for its state {missing}; export the model anew")
        self._returned = [OUTPUT + name for name in self._initial]
        self._outputs = [name for name in outputs if name not in self._returned]
        self.state: dict[str, np.ndarray[Any, Any]] = {}
        self.reset()

    def reset(self) -> None:
        """Go back to the state before the first call."""
        self.state = {name: value.copy() for name, value in self._initial.items()}

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], run_options: Any = None) -> list[Any]:
        """As the session's own ``run``, with the state given and kept.

        Args:
            output_names: Those to return; None for all but the state.
            feeds: The inputs by name, without the state.
            run_options: As for the session.
        """
        wanted = self._outputs if output_names is None else list(output_names)
        given = {**feeds, **{INPUT + name: value for name, value in self.state.items()}}
        results = self._session.run([*wanted, *self._returned], given, run_options)
        self.state = dict(zip(self._initial, results[len(wanted) :], strict=True))
        return list(results[: len(wanted)])
