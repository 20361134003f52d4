"""One ONNX file in four forms: dense, dense int8, sparse, sparse int8.

Owns what each is made of, and by what. It must not know how they are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srigl_fx.errors import ExportError, FormatError, SriglError
from srigl_fx.onnx_condensing.byte_operators import BYTE_OPERATORS
from srigl_fx.onnx_export.file import FileReport, all_nodes, inspect_file, read_model

DENSE, DENSE_INT8, SPARSE, SPARSE_INT8 = FORMS = ("dense", "dense_int8", "sparse", "sparse_int8")
GIVEN = "the file"
_MOST_WORDS = 200


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of a file.

    Attributes:
        name: One of :data:`FORMS`.
        path: Where it is; None where it cannot be made.
        bytes: Its size.
        condensed_layers: How many condensed nodes it has.
        made_by: What it was made of, and by what.
        reason: Why it is not there.
    """

    name: str
    path: Path | None = None
    bytes: int = 0
    condensed_layers: int = 0
    made_by: str = ""
    reason: str = ""


def make_forms(file: Path, folder: Path) -> list[Form]:
    """The four forms of a file, of which it is one itself; those that are made are written to ``folder``.

    The dense form of a file with condensed layers is what :func:`srigl_fx.onnx_tools.densify` makes of it, and the
    sparse form of another file what :func:`srigl_fx.condense_onnx` makes of it. Dense int8 is what ONNX Runtime's
    ``quantize_dynamic`` makes of the dense form, and sparse int8 what is condensed of that. Where no layer is expected
    to gain, all are condensed. A file whose samples are rounded to eight bits already has no other forms than these.

    Raises:
        FormatError: The file is no ONNX file, or cannot be read.
        ExportError: It has operators that have no standard form.
    """
    report = inspect_file(file)
    if not report.nodes and _is_rounded(file):
        return [
            _form(DENSE_INT8, file, GIVEN),
            _made(
                SPARSE_INT8, folder / f"{SPARSE_INT8}.onnx", "the file, by condense", lambda path: _condense(file, path)
            ),
        ]
    given = SPARSE_INT8 if any("Int8" in node.operator for node in report.nodes) else SPARSE if report.nodes else DENSE
    dense = file
    if report.nodes:
        from srigl_fx.onnx_tools import densify

        dense = folder / "dense.onnx"
        densify(file, dense)
    rounded = folder / f"{DENSE_INT8}.onnx"
    ways: dict[str, tuple[str, Callable[[Path], None]]] = {
        DENSE_INT8: ("dense, by quantize_dynamic", lambda path: _quantise(dense, path)),
        SPARSE: ("dense, by condense", lambda path: _condense(dense, path)),
        SPARSE_INT8: ("dense_int8, by condense", lambda path: _condense(rounded, path)),
    }
    forms = [_form(DENSE, dense, GIVEN if given == DENSE else "the file, by densify")]
    for name, (made_by, make) in ways.items():
        if name == given:
            forms.append(_form(name, file, GIVEN))
        elif name == SPARSE_INT8 and not rounded.exists():
            forms.append(Form(name=name, reason="there is no dense_int8 to make it of"))
        else:
            forms.append(_made(name, folder / f"{name}.onnx", made_by, make))
    return forms


def _is_rounded(file: Path) -> bool:
    """Whether a file is one of eight bits: it rounds samples, or multiplies bytes."""
    return any(node.op_type in {"QuantizeLinear", *BYTE_OPERATORS} for node in all_nodes(read_model(file).graph))


def _form(name: str, path: Path, made_by: str) -> Form:
    report: FileReport = inspect_file(path)
    return Form(name=name, path=path, bytes=report.file_bytes, condensed_layers=len(report.nodes), made_by=made_by)


def _made(name: str, path: Path, made_by: str, make: Callable[[Path], None]) -> Form:
    try:
        make(path)
    except SriglError as error:
        reason = " ".join(str(error).split()).replace(f"{path.parent}/", "")
        return Form(name=name, reason=reason if len(reason) <= _MOST_WORDS else f"{reason[:_MOST_WORDS]}...")
    return _form(name, path, made_by)


def _quantise(source: Path, path: Path) -> None:
    import onnx

    from srigl_fx.demo.dense_int8 import dynamic_int8

    try:
        path.write_bytes(dynamic_int8(onnx.load(source).SerializeToString()))
    except Exception as error:  # of ONNX Runtime's tools, any type
        raise FormatError(f"quantize_dynamic fails: {error}") from error


def _condense(source: Path, path: Path) -> None:
    """Condense what is expected to gain; where nothing is, all: then it is measured what that loses."""
    from srigl_fx.onnx_condensing.pipeline import condense_onnx

    try:
        condense_onnx(source, path, verify=False)  # the outputs of all forms are compared
    except ExportError:
        condense_onnx(source, path, verify=False, min_speedup=0)
