"""The large tensors of a model, inside its file or in one file of weights beside it.

Owns taking them out of a model in memory, so that only its graph is handled, and writing both. It must not know what
they are for, nor how models are read.

A file of weights holds one tensor behind the other. Each starts at a multiple of 64 bytes, large ones at that of a
page, so that ONNX Runtime maps the file into memory and operators read it there. Tensors are written one by one.

It is called by the model's name and by what it holds, so that no graph is ever read with the weights of another one. It
gets its name before the graph does; the one that the graph before named goes after that, unless a copy of that graph in
the folder names it, too. A process that is killed meanwhile leaves the old pair or the new one, and perhaps a file of
weights that nobody names.
"""

import contextlib
import hashlib
import mmap
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from srigl_fx.errors import ExportError
from srigl_fx.files import check_replaceable, move_durably, place_of, replacing
from srigl_fx.onnx_export.file import all_graphs, all_tensors
from srigl_fx.onnx_export.reading import LARGE, refer
from srigl_fx.reports.text_tables import format_bytes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ExternalData = bool | Literal["auto"]
LARGEST_FILE: Final = 2**31 - 1  # what one protobuf message may hold
SUFFIX: Final = ".data"  # behind the name of the model's file and what stands for the content
_DIGITS: Final = 16  # of the content's SHA-256
_LINE, _PAGE, _BLOCK = 64, 4096, 2**20
_ASIDE: Final = "srigl_fx.aside."  # before the numbers of tensors that are kept apart


def check_external_data(asked: ExternalData) -> None:
    """Require one of the values that the argument ``external_data`` has.

    Raises:
        ExportError: It is another one.

    Example:
        >>> check_external_data("auto")
    """
    if asked != "auto" and not isinstance(asked, bool):
        raise ExportError(f'external_data must be True, False or "auto", not {asked!r}')


def require_place(path: Path) -> None:
    """Require that a model can be written to a path.

    Raises:
        ExportError: There is no such folder, or something else than a file is there.

    Example:
        >>> require_place(Path("no folder", "a.onnx"))
        Traceback (most recent call last):
        srigl_fx.errors.ExportError: cannot write no folder/a.onnx: there is no folder 'no folder'; give the path of...
    """
    try:
        check_replaceable(path)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror}; give the path of a file in a folder that exists"
        ) from error


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
            if tensor is None or tensor.nbytes < LARGE or tensor.dtype == ir.DataType.STRING:
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
        spared: Files that it must not take the place of, nor take away: those of its source, as
            :func:`~srigl_fx.onnx_export.reading.open_model` finds them.

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
    if _is_spared(target, spared):
        raise ExportError(
            f"cannot write {target}: the source keeps tensors in it, and would lose them; give another path"
        )
    lost = {one for one in _own_weights(target) if not _is_spared(one, spared)}
    if held and (external_data is True or size > LARGEST_FILE):
        with _replacing_both(target, lost) as folder:
            part = folder / target.name
            _write_beside(part, model, held)
            del model, held
            yield part
    else:
        with replacing(target) as part:
            _write_whole(part, model, held)
            del model, held
            yield part
    for one in lost - _named_by_others(target, lost):
        with contextlib.suppress(OSError):  # one that cannot be removed is in nobody's way
            one.unlink()


def _write_whole(part: Path, model: "onnx.ModelProto", held: Mapping[str, Any]) -> None:
    """The model with its large tensors in itself."""
    places = _places(model)
    for key, tensor in held.items():
        refer(places[key], "", 0, 0)
        places[key].raw_data = tensor.tobytes()
    part.write_bytes(model.SerializeToString())


def _write_beside(part: Path, model: "onnx.ModelProto", held: Mapping[str, Any]) -> None:
    """The model, and its large tensors in a file beside it that is called by their content."""
    unnamed, digest, found = part.with_name(f"{part.name}{SUFFIX}"), hashlib.sha256(), dict[str, tuple[int, int]]()
    with unnamed.open("wb") as file:
        for key, tensor in held.items():
            found[key] = _append(file, tensor, digest)
    weights = part.with_name(f"{part.name}.{digest.hexdigest()[:_DIGITS]}{SUFFIX}")
    unnamed.rename(weights)
    places = _places(model)
    for key, place in found.items():
        refer(places[key], weights.name, *place)
    part.write_bytes(model.SerializeToString())


def _is_spared(path: Path, spared: Collection[Path]) -> bool:
    """Whether a file is one that another model needs."""
    return place_of(path) in spared


def _own_weights(target: Path) -> list[Path]:
    """The files of weights that the model at a path names and that are called like it, which go with it."""
    called = re.compile(re.escape(target.name) + rf"(\.[0-9a-f]{{{_DIGITS}}})?" + re.escape(SUFFIX))
    found = [one for one in target.parent.iterdir() if called.fullmatch(one.name) and one.is_file()]
    if found and target.is_file() and target.stat().st_size:
        with (
            contextlib.suppress(OSError),  # of one that cannot be read, nothing is known
            target.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return [one for one in found if content.find(_as_value(one.name)) >= 0]
    return []


def _named_by_others(target: Path, files: Collection[Path]) -> set[Path]:
    """Which of these files of weights another model in the folder names: a copy that was made without them."""
    left, named = {one: _as_value(one.name) for one in files}, set[Path]()
    longest = max(map(len, left.values()), default=0)
    for other in target.parent.iterdir() if left else ():
        if ".onnx" not in other.name.lower() or other.name == target.name or other.name.endswith(SUFFIX):
            continue
        with contextlib.suppress(OSError):  # whoever cannot read it does not use it
            if not other.is_file():
                continue
            with other.open("rb") as file:
                tail = b""
                while block := file.read(_BLOCK):
                    content = tail + block
                    named |= {one for one, value in left.items() if value in content}
                    tail = content[1 - longest :]
    return named


def _as_value(text: str) -> bytes:
    """How protobuf writes the value of an entry."""
    from onnx import StringStringEntryProto

    return bytes(StringStringEntryProto(value=text).SerializeToString())


def _places(model: "onnx.ModelProto") -> "dict[str, onnx.TensorProto]":
    """The tensors that were taken out, by their keys."""
    from onnx import TensorProto

    found = {}
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                found[tensor.external_data[0].value] = tensor
    return found


def _append(file: BinaryIO, tensor: Any, digest: Any) -> tuple[int, int]:
    """Write a tensor; where it starts, and its bytes."""
    step = _PAGE if tensor.nbytes >= 2**20 else _LINE
    gap = bytes(-file.tell() % step)
    file.write(gap)
    start, content = file.tell(), tensor.tobytes()
    file.write(content)
    digest.update(gap)
    digest.update(content)
    let_go(tensor)
    return start, file.tell() - start


class Aside:
    """The large constants of messages, kept apart while something handles their graphs, as :func:`take_out` does.

    Attributes:
        tensors: By the name that their place in a message has as its file, for :func:`writing`.

    Example:
        >>> import numpy as np, onnx
        >>> graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(np.ones((64, 64)), "w")])
        >>> model, aside = onnx.helper.make_model(graph), Aside()
        >>> aside.take(model)
        >>> list(model.graph.initializer[0].dims), aside.tensors["srigl_fx.aside.0"].nbytes
        ([0], 32768)
        >>> aside.give_places(model)
        >>> list(model.graph.initializer[0].dims)
        [64, 64]
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self._heads: dict[str, onnx.TensorProto] = {}

    def take(self, model: "onnx.ModelProto") -> None:
        """Leave large constants empty, so that what checks the message does not look for their files."""
        import onnx_ir as ir
        from onnx import TensorProto

        for graph in all_graphs(model.graph):
            for tensor in graph.initializer:
                is_beside = tensor.data_location == TensorProto.EXTERNAL
                if tensor.data_type == TensorProto.STRING or (not is_beside and tensor.ByteSize() < LARGE):
                    continue
                key = f"{_ASIDE}{len(self.tensors)}"
                whole, head = TensorProto(), TensorProto(dims=tensor.dims, doc_string=tensor.doc_string)
                whole.CopyFrom(tensor)
                self.tensors[key], self._heads[key] = ir.from_proto(whole), head
                tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0], doc_string=key))
        for tensor in all_tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:  # in a node: nobody keeps much there
                held: Any = ir.from_proto(tensor)
                content = held.tobytes()
                refer(tensor, "", 0, 0)
                tensor.raw_data = content

    def give_places(self, model: "onnx.ModelProto") -> None:
        """Give the constants in a message, whatever they are called by now, their sizes back."""
        for graph in all_graphs(model.graph):
            for tensor in graph.initializer:
                head = self._heads.get(tensor.doc_string)
                if head is not None:
                    key = tensor.doc_string
                    del tensor.dims[:]
                    tensor.MergeFrom(head)
                    tensor.doc_string = head.doc_string
                    refer(tensor, key, 0, 0)


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


@contextlib.contextmanager
def _replacing_both(target: Path, lost: set[Path]) -> Iterator[Path]:
    """A folder for a model and its weights, which get their places when the block ends: first the weights.

    Those weights are no longer lost, if they were.
    """
    check_replaceable(target)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    try:
        yield folder
        for weights in list(folder.iterdir()):
            if weights.name != target.name:
                beside = target.with_name(weights.name)
                check_replaceable(beside)
                move_durably(weights, beside)
                lost.discard(beside)
        move_durably(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
