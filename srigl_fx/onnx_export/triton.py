"""A model folder for Triton Inference Server: the ONNX file, the operator library, and a configuration that names both.

Owns what stands in ``config.pbtxt`` and where files lie. It must not know how a file was made. The fields are those of
Triton's ``ModelConfig`` (``model_config.proto``); its backend ``onnxruntime`` opens the operator library by the path
that is given there, as the server sees it.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_export.file import all_nodes, all_tensors, read_model
from srigl_fx.onnx_export.limits import limits_in
from srigl_fx.onnx_export.reading import lies_beside
from srigl_fx.passes.sizes import ANY, span_of
from srigl_fx.runtime.ort.abi import DOMAIN, OPERATORS
from srigl_fx.runtime.ort.library import library_path

if TYPE_CHECKING:
    import onnx

LIBRARY: Final = "libsrigl_fx.so"
MAX_BATCH_SIZE: Final = 64
# Triton's names of ONNX's types of elements, by ONNX's names.
_TYPES: Final = {
    **{name: f"TYPE_{name}" for name in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32")},
    **{"INT64": "TYPE_INT64", "FLOAT16": "TYPE_FP16", "FLOAT": "TYPE_FP32", "DOUBLE": "TYPE_FP64"},
    "STRING": "TYPE_STRING",
}
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ARGUMENTS: Final = ("repository", "name", "served_from", "max_batch_size", "threads")
_MODEL: Final = "model.onnx"  # what Triton's backend opens


def triton_model(
    path: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    served_from: str = "/models",
    max_batch_size: int | None = None,
    threads: int = 1,
) -> Path:
    """Write a folder of Triton's model repository that serves an ONNX file with condensed layers.

    The folder is ``repository/name``: ``config.pbtxt``, the operator library, and ``1/model.onnx`` with the files that
    it keeps its tensors in. Requests are batched by the server where every input and output has a leading size that is
    free and bears one name.

    Args:
        path: A file of ``export_onnx`` or ``condense_onnx``; any other ONNX file is served without the library.
        repository: A folder that exists, with one folder in it for each model.
        name: Of the model; by default that of the file, without its ending. Letters, digits, "_", "-" and ".".
        served_from: Where the server finds ``repository``: an absolute path in its container. The library's path is
            part of the configuration, and Triton takes it as it stands.
        max_batch_size: The most samples that the server puts into a batch; 0 leaves requests as they are. By default
            64 where the leading sizes allow it, or the most that the file takes if that is less, else 0; and 0 where
            the file refuses one sample.
        threads: Of each instance of the model (``intra_op_thread_count``), at least 1.

    Returns:
        The model's folder. It appears whole or not at all.

    Raises:
        FormatError: The file cannot be read, or is no ONNX file, or a file that it keeps tensors in is missing, or a
            link to another folder.
        ExportError: The folder exists already, an argument is out of range, the model has an input or output that
            Triton cannot hold, the leading sizes or their limits do not allow a batch that is asked for, or the file
            calls operators of another version of the library.
        LibraryError: The file needs the operator library, and it cannot be built here.

    Example:
        >>> triton_model("missing.onnx", ".")
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: cannot read missing.onnx: No such file or directory
    """
    source = Path(path)
    model = read_model(source)
    name = source.stem if name is None else name
    target = _target(Path(repository), name, served_from, threads)
    ours = {node.op_type for node in all_nodes(model.graph) if node.domain == DOMAIN}
    if unknown := sorted(ours - {*OPERATORS} - {one.name for one in model.functions if one.domain == DOMAIN}):
        raise ExportError(
            f"{source} calls {unknown[0]}, which is no operator of the library that is installed here: another version "
            "wrote it; write the folder with that one, or export the model anew"
        )
    library = str(PurePosixPath(served_from, name, LIBRARY)) if ours.intersection(OPERATORS) else ""
    if not model.graph.output or all(kind == "output" for kind, _ in _tensors(model)):
        raise ExportError(f"{source} has no {'inputs' if model.graph.output else 'outputs'}, which Triton needs")
    text = _configuration(model, name, _batch(model, max_batch_size), threads, library)
    beside = [_beside(source, location) for location in _locations(model, source)]
    if any(one.name == _MODEL for one in beside):
        raise ExportError(
            f"{source} keeps tensors in a file that is called {_MODEL}, as Triton calls the model: rename it"
        )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as part:
            whole = Path(part, name)
            (whole / "1").mkdir(parents=True)
            shutil.copyfile(source, whole / "1" / _MODEL)
            for one in beside:
                shutil.copyfile(one, whole / "1" / one.name)
            if library:
                shutil.copyfile(library_path(), whole / LIBRARY)
            (whole / "config.pbtxt").write_text(text, encoding="utf-8")
            os.rename(whole, target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def requested(given: str | os.PathLike[str] | Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What somebody asks of :func:`triton_model` for a file that is yet to be written, checked as far as it can be.

    Args:
        given: The repository, or the arguments of :func:`triton_model` by name, ``repository`` among them.
        path: The file.

    Raises:
        ExportError: An argument is unknown, missing or out of range, or the folder exists already.

    Example:
        >>> requested({"repository": ".", "threads": 2}, Path("bert.onnx"))
        {'repository': '.', 'threads': 2, 'name': 'bert'}
    """
    if not isinstance(given, str | os.PathLike | Mapping):
        raise ExportError(f"triton must be a folder, or a dict of what triton_model takes, not {given!r:.200}")
    options = dict(given) if isinstance(given, Mapping) else {"repository": given}
    if unknown := [key for key in options if key not in _ARGUMENTS]:
        raise ExportError(f"triton has no option {unknown[0]!r}; there are {', '.join(_ARGUMENTS)}")
    if not isinstance(options.get("repository"), str | os.PathLike):
        raise ExportError("triton needs the folder of all models: {'repository': folder, ...}")
    if options.get("name") is None:
        options["name"] = path.stem
    _target(
        Path(options["repository"]), options["name"], options.get("served_from", "/models"), options.get("threads", 1)
    )
    _check_batch(options.get("max_batch_size"))
    return options


def _target(folder: Path, name: object, served_from: object, threads: object) -> Path:
    """The model's folder, which does not exist; all that can be said without the model is checked."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r:.200} cannot be the name of a model: up to 128 letters, digits, '_', '-' and '.'; give name="
        )
    if not isinstance(served_from, str) or not served_from.startswith("/"):
        raise ExportError(f'served_from must be an absolute path such as "/models", not {served_from!r}')
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ExportError(f"threads must be a whole number of at least 1, not {threads!r}")
    if not folder.is_dir():
        raise ExportError(f"there is no folder {str(folder)!r}; make it first")
    target = folder / name
    if os.path.lexists(target):
        raise ExportError(f"{target} exists already; remove it, or give the model another name")
    return target


def _beside(source: Path, location: str) -> Path:
    """A file that tensors are kept in. A link must lead to where it lies itself, or to where the model really lies."""
    path = source.parent / location
    real = path.resolve()
    if not real.is_file():
        raise FormatError(f"{source} keeps tensors in {path}, which is missing; put the files side by side")
    if not lies_beside(source, path):
        raise FormatError(
            f"{source} keeps tensors in {path}, a link to another folder, of which nothing is copied: put the file "
            "itself there"
        )
    return path


def _locations(model: "onnx.ModelProto", path: Path) -> list[str]:
    """The files, by name, that the model keeps tensors in; they must lie in its folder."""
    from onnx import TensorProto

    stored = [
        entry for one in all_tensors(model) if one.data_location == TensorProto.EXTERNAL for entry in one.external_data
    ]
    found = {entry.value for entry in stored if entry.key == "location"}
    for location in found:
        if Path(location).name != location or location in ("", ".", ".."):
            raise FormatError(f"{path} keeps tensors in {location!r}, which is no file of its own folder")
    return sorted(found)


def _check_batch(asked: object) -> None:
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked < 1 << 31):
        raise ExportError(f"max_batch_size must be a whole number of at least 0 and less than 2**31, not {asked!r}")


def _batch(model: "onnx.ModelProto", asked: int | None) -> int:
    """The most samples of a batch, or 0 where requests are not put together.

    Triton leaves the leading axis out of what it describes, and stacks requests along it: it must be that of samples in
    every input and output, which a file says by one name for all of them.
    """
    _check_batch(asked)
    leading: dict[str, str] = {}
    for _, value in _tensors(model):
        axes = value.type.tensor_type.shape.dim
        leading[value.name] = axes[0].dim_param if axes else ""
    names = set(leading.values())
    if len(names) == 1 and "" not in names:
        least, most = limits_in(model).get(names.pop(), ANY)
        if asked is None:
            return 0 if least > 1 else min(MAX_BATCH_SIZE, MAX_BATCH_SIZE if most is None else most)
        if asked and not least <= asked <= (asked if most is None else most):
            raise ExportError(
                f"max_batch_size={asked} is none that the file takes: its batches are {span_of(least, most)}"
            )
        return asked
    if asked:
        listed = ", ".join(f"{tensor} {size or 'fixed or without a name'}" for tensor, size in leading.items())
        raise ExportError(
            f"max_batch_size={asked} needs one free leading size in all inputs and outputs, and they are: {listed}; "
            "leave max_batch_size out"
        )
    return 0


def _tensors(model: "onnx.ModelProto") -> "list[tuple[str, onnx.ValueInfoProto]]":
    """The inputs and the outputs, each with which it is; constants that old files list among their inputs are none."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [("input", value) for value in model.graph.input if value.name not in constants]
    return inputs + [("output", value) for value in model.graph.output]


def _configuration(model: "onnx.ModelProto", name: str, batch: int, threads: int, library: str) -> str:
    """``config.pbtxt``, in protobuf's text form."""
    lines = [f"name: {_quoted(name)}", 'backend: "onnxruntime"', f"max_batch_size: {batch}"]
    for kind, value in _tensors(model):
        lines += _described(kind, value, batched=batch > 0)
    if batch:
        lines.append("dynamic_batching { }")
    lines += [
        "instance_group [ { kind: KIND_CPU } ]",
        f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}',
    ]
    if library:
        lines.append(f"model_operations {{ op_library_filename: {_quoted(library)} }}")
    return "\n".join(lines) + "\n"


def _described(kind: str, value: "onnx.ValueInfoProto", *, batched: bool) -> list[str]:
    """An input or output, without the axis of samples where requests are put together."""
    from onnx import TensorProto

    tensor = value.type.tensor_type
    names = {number: name for name, number in TensorProto.DataType.items()}
    element = names.get(tensor.elem_type, "unknown") if value.type.HasField("tensor_type") else "no tensor"
    if element not in _TYPES:
        raise ExportError(f"Triton cannot hold the {kind} {value.name!r}, which is {element}")
    if not tensor.HasField("shape"):
        raise ExportError(f"the file does not say how many axes the {kind} {value.name!r} has")
    sizes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim][batched:]
    if not sizes and not batched:
        raise ExportError(f"the {kind} {value.name!r} has no axes, which Triton holds only where it batches requests")
    if wrong := [size for size in sizes if size == 0 or size < -1]:
        raise ExportError(f"Triton cannot hold the {kind} {value.name!r}, which has an axis of size {wrong[0]}")
    lines = [f"{kind} {{", f"  name: {_quoted(value.name)}", f"  data_type: {_TYPES[element]}"]
    if sizes:
        lines.append(f"  dims: [ {', '.join(map(str, sizes))} ]")
    else:  # beside the samples there must be an axis: one of size 1, which is taken away before the model sees it
        lines += ["  dims: [ 1 ]", "  reshape { shape: [ ] }"]
    return [*lines, "}"]


def _quoted(text: str) -> str:
    """As a string of protobuf's text form."""
    from google.protobuf.text_encoding import CEscape

    return f'"{CEscape(text, as_utf8=True)}"'
