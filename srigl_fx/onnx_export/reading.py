"""Models from files that nobody vouches for, without their large tensors.

Owns which files of weights such a model may read, and how a tensor says where it lies. It must not know how files are
written, nor what tensors are for.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from srigl_fx.errors import FormatError
from srigl_fx.onnx_export.file import all_tensors, read_model

if TYPE_CHECKING:
    import onnx

LARGE: Final = 1024  # bytes; what is smaller stays in the graph, where tools look for shapes and axes


def refer(tensor: "onnx.TensorProto", location: str, offset: int, length: int) -> None:
    """Say where a tensor is: in this file of weights, or, with "" for one, in the message.

    Example:
        >>> import onnx
        >>> tensor = onnx.TensorProto(name="w")
        >>> refer(tensor, "a.data", 64, 4096)
        >>> [entry.value for entry in tensor.external_data]
        ['a.data', '64', '4096']
    """
    from onnx import TensorProto

    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL if location else TensorProto.DEFAULT
    if location:
        for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)


def lies_beside(path: Path, called: Path) -> bool:
    """Whether a file is one that a model may keep tensors in: it is in the folder of the model, or below it.

    A link must lead to where it lies itself, or to where the model really lies, as downloads are kept: as links to one
    folder of files.

    Args:
        path: The model.
        called: The file, as the model calls it.

    Example:
        >>> lies_beside(Path("a.onnx"), Path("a.data")), lies_beside(Path("a.onnx"), Path("/a.data"))
        (True, False)
    """
    where = called.parent.resolve()
    return where.is_relative_to(path.parent.resolve()) and called.resolve().parent in (where, path.resolve().parent)


def open_model(path: Path, files: set[Path] | None = None) -> "onnx.ModelProto":
    """A model without its large tensors, which stay in files beside it, checked to be where they are said to be.

    Args:
        path: The model's file.
        files: Where given, the files beside it are put there: as the model calls them, and with links followed.

    Returns:
        The model; the locations of its large tensors are whole paths, with links followed.

    Raises:
        FormatError: The file cannot be read, is no ONNX file, or one of its tensors lies outside of its folder, in no
            regular file, or not within that file.
    """
    from onnx import TensorProto

    model = read_model(path)
    for tensor in all_tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        called, offset, size = _checked_place(path, tensor)
        file = called.resolve()
        if files is not None:
            files |= {called, file}
        if size >= LARGE:
            refer(tensor, str(file), offset, size)
            continue
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                content = opened.read(size)
        except OSError as error:
            raise FormatError(f"cannot read {file}: {error.strerror or error}") from error
        refer(tensor, "", 0, 0)
        tensor.raw_data = content
    return model


def _checked_place(path: Path, tensor: "onnx.TensorProto") -> tuple[Path, int, int]:
    """The file of a tensor beside a model, where it starts, and its bytes; that it lies there is checked."""
    import onnx_ir as ir

    where = f"the tensor {tensor.name!r} of {path}"
    said = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset, bits = int(said.get("offset") or 0), int(ir.DataType(tensor.data_type).bitwidth)
        size = int(-(-math.prod(tensor.dims) * bits // 8))
        length = int(said.get("length") or size)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{where} is said to lie at {said}, with the type {tensor.data_type}, which is no place"
        ) from error
    folder = path.parent.resolve()
    location = said.get("location", "")
    called = Path(os.path.normpath(folder / location))
    # The byte 0 ends a path for the system, and none for Python.
    if not location or "\0" in location or os.path.isabs(location) or not called.is_relative_to(folder):
        raise FormatError(f"{where} lies in {location!r}, which is no file of its folder")
    file = called.resolve()
    if file.exists() and not file.is_dir() and not lies_beside(path, called):
        raise FormatError(f"{where} lies in {location!r}, which is no file of its folder")
    if not file.is_file():
        raise FormatError(f"{where} lies in {location}, which is missing or no file; put the files side by side")
    if min(tensor.dims, default=0) < 0 or offset < 0 or length != size or offset + length > file.stat().st_size:
        raise FormatError(
            f"{where} takes {size} bytes, and is said to be {length} at {offset} of {location}, which has "
            f"{file.stat().st_size}; the file is damaged, or not all of it"
        )
    return called, offset, size
