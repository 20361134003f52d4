"""The large tensors of a model, inside its file or in one file of weights beside it.

Owns taking them out of a model in memory, so that only its graph is handled, and writing both; and which files of
weights a model that nobody vouches for may read. It must not know what they are for.

A file of weights holds one tensor behind the other. Each starts at a multiple of 64 bytes, large ones at that of a
page, so that ONNX Runtime maps the file into memory and operators read it there. Tensors are written one by one.
"""

import contextlib
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from srigl_fx.errors import ExportError, FormatError
from srigl_fx.files import check_replaceable, move_durably, replacing
from srigl_fx.onnx_export.file import all_graphs, all_tensors
from srigl_fx.reports.text_tables import format_bytes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ExternalData = bool | Literal["auto"]
LARGEST_FILE: Final = 2**31 - 1  # what one protobuf message may hold
SUFFIX: Final = ".data"  # behind the name of the model's file
_LARGE: Final = 1024  # bytes; what is smaller stays in the graph, where tools look for shapes and axes
_LINE, _PAGE = 64, 4096


def check_external_data(asked: ExternalData) -> None:
    """Require one of the values that the argument ``external_data`` has.

    Raises:
        ExportError: It is another one.

    Example:
        >>> check_external_data("auto")
    """
    if asked != "auto" and not isinstance(asked, bool):
        raise ExportError(f'external_data must be True, False or "auto", not {asked!r}')


def take_out(model: "ir.Model") -> dict[str, Any]:
    """Leave only the sizes of large tensors in a model, so that its graph alone becomes a message of protobuf.

    Returns:
        The tensors, by the name that their place in the message has as its file.

    Example:
        >>> import numpy as np, onnx_ir as ir
        >>> w = ir.val("w", const_value=ir.tensor(np.zeros((64, 64), np.float32), name="w"))
        >>> model = ir.Model(ir.Graph([], [], nodes=[], initializers=[w], opset_imports={"": 18}), ir_version=9)
        >>> list(take_out(model)), ir.to_proto(model).ByteSize() < 100
        (['0'], True)
    """
    import onnx_ir as ir

    held: dict[str, Any] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _LARGE or tensor.dtype == ir.DataType.STRING:
                continue
            key = str(len(held))
            held[key] = tensor
            value.const_value = ir.ExternalTensor(
                key, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or key
            )
    return held


@contextlib.contextmanager
def writing(
    target: Path,
    model: "onnx.ModelProto",
    held: Mapping[str, Any],
    external_data: ExternalData,
    spared: Collection[Path] = (),
) -> Iterator[Path]:
    """A path of the written model, which becomes ``target`` when the block ends; its weights come along.

    If the block raises, ``target`` and what is beside it are what they were. While it runs, the graph and the tensors
    are kept by the caller alone, if at all.

    Args:
        target: The file.
        model: The graph.
        held: What :func:`take_out` took from it.
        external_data: Whether large tensors go to a file beside it; "auto" is where one file cannot hold all.
        spared: Files that it must not take the place of (:func:`open_model` finds those of a model).

    Raises:
        ExportError: One file cannot hold all, and is asked to; or one of those files would be lost.
    """
    rest = model.ByteSize()
    size = rest + sum(tensor.nbytes + _LINE for tensor in held.values())
    if rest > LARGEST_FILE or (size > LARGEST_FILE and external_data is False):
        raise ExportError(
            f"the model takes {format_bytes(size)}, more than one file holds (2 GiB): leave external_data at "
            '"auto", which puts its weights into a file beside it'
            if rest <= LARGEST_FILE
            else f"the graph alone takes {format_bytes(rest)}, more than one file holds (2 GiB)"
        )
    if held and (external_data is True or size > LARGEST_FILE):
        _spare(spared, target, target.with_name(target.name + SUFFIX))
        with _replacing_both(target) as (part, weights):
            _write(part, model, held, weights)
            del model, held
            yield part
    else:
        _spare(spared, target)
        with replacing(target) as part:
            _write(part, model, held, None)
            del model, held
            yield part


def _write(part: Path, model: "onnx.ModelProto", held: Mapping[str, Any], weights: Path | None) -> None:
    """The model with its large tensors in ``weights``, or in itself."""
    places = _places(model)
    if weights is None:
        for key, tensor in held.items():
            _refer(places[key], "", 0, 0)
            places[key].raw_data = tensor.tobytes()
    else:
        with weights.open("wb") as file:
            for key, tensor in held.items():
                _refer(places[key], weights.name, *_append(file, tensor))
    part.write_bytes(model.SerializeToString())


def _spare(spared: Collection[Path], *written: Path) -> None:
    """Require that no file which another model needs is written over."""
    for path in written:
        if path.parent.resolve() / path.name in spared:
            raise ExportError(
                f"cannot write {path}: the source keeps tensors in it, and would lose them; give another path"
            )


def _places(model: "onnx.ModelProto") -> "dict[str, onnx.TensorProto]":
    """The tensors that were taken out, by their keys."""
    from onnx import TensorProto

    found = {}
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                found[tensor.external_data[0].value] = tensor
    return found


def _append(file: BinaryIO, tensor: Any) -> tuple[int, int]:
    """Write a tensor; where it starts, and its bytes."""
    step = _PAGE if tensor.nbytes >= 2**20 else _LINE
    file.write(bytes(-file.tell() % step))
    start = file.tell()
    file.write(tensor.tobytes())
    let_go(tensor)
    return start, file.tell() - start


def let_go(tensor: Any) -> None:
    """Unmap a tensor that is read from a file; it is mapped again when it is read again.

    Example:
        >>> let_go(None)
    """
    import onnx_ir as ir

    # A constant that something still looks at cannot be unmapped.
    if isinstance(tensor, ir.ExternalTensor) and hasattr(tensor, "release"):
        with contextlib.suppress(BufferError):
            tensor.release()


def _refer(tensor: "onnx.TensorProto", location: str, offset: int, length: int) -> None:
    """Say where a tensor is: in this file of weights, or, without one, in the message."""
    from onnx import TensorProto

    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL if location else TensorProto.DEFAULT
    if location:
        for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)


@contextlib.contextmanager
def _replacing_both(target: Path) -> Iterator[tuple[Path, Path]]:
    """Paths for a model and its weights, which get their names when the block ends: first the weights."""
    beside = target.with_name(target.name + SUFFIX)
    check_replaceable(target)
    check_replaceable(beside)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    try:
        yield folder / target.name, folder / beside.name
        move_durably(folder / beside.name, beside)
        move_durably(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    import onnx
    from onnx import TensorProto

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's and those of onnx have no base class
        raise FormatError(
            f"{path} is no ONNX file: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    for tensor in all_tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        called, offset, size = _checked_place(path, tensor)
        file = called.resolve()
        if files is not None:
            files |= {called, file}
        if size >= _LARGE:
            _refer(tensor, str(file), offset, size)
            continue
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                content = opened.read(size)
        except OSError as error:
            raise FormatError(f"cannot read {file}: {error.strerror or error}") from error
        _refer(tensor, "", 0, 0)
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
