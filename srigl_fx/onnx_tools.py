"""What people do with ONNX files after export, such that condensed layers stay condensed or become dense as asked.

Owns :func:`merge` and :func:`densify`, from files to a file, and :func:`recipe`, from a file to what its model was made
by; :func:`triton_model`, a folder to serve a file from, is offered here. It must not know torch, masks or how files are
exported.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srigl_fx.errors import ExportError, FormatError, RecipeError
from srigl_fx.files import place_of
from srigl_fx.onnx_export import recipes
from srigl_fx.onnx_export.file import all_nodes, read_model
from srigl_fx.onnx_export.model import functions_for
from srigl_fx.onnx_export.names import rename_values
from srigl_fx.onnx_export.reading import LARGE, open_model
from srigl_fx.onnx_export.triton import triton_model as triton_model
from srigl_fx.onnx_export.weights import Aside, require_place, writing
from srigl_fx.recipe_parts import parts_of
from srigl_fx.recipes import Recipe
from srigl_fx.runtime.ort import abi, stream
from srigl_fx.runtime.ort.contents import MARK

if TYPE_CHECKING:
    import numpy as np
    import onnx

_STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})


def merge(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    path: str | os.PathLike[str],
    io_map: Mapping[str, str],
    *,
    prefixes: tuple[str, str] = ("", ""),
) -> None:
    """Join two files into one in which condensed layers stay condensed.

    ``onnx.compose.merge_models`` does the work. Given a prefix, it renames functions and whatever calls them, and no
    operator library knows a ``CondensedLinear`` by another name: here the functions are taken out before and put back
    after. State in either file is state of the whole: what was ``mean`` is called ``a_mean`` after the prefix "a_".

    A recipe in one of the files is that of the whole. Where both have one, :func:`recipe` finds each under a name: the
    file's prefix without the punctuation at its end, or the file's own name without its ending; "1" and "2" where
    these are equal.

    Args:
        first: The file whose outputs are read by the other.
        second: The file that reads them.
        path: The file to write; it appears whole or not at all. Its weights are in a file beside it where one file
            cannot hold all (2 GiB).
        io_map: Names of outputs of ``first``, and of the inputs of ``second`` that they become.
        prefixes: What to put before all names of each file, so that none stands in both.

    Raises:
        FormatError: A file cannot be read, or is no ONNX file.
        RecipeError: The recipe in a file is damaged.
        ExportError: The two do not fit together: an output and its input have other types or sizes, or
            ``onnx.compose`` says what is wrong.

    Example:
        >>> merge("missing.onnx", "missing.onnx", "both.onnx", {"y": "x"})
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: cannot read missing.onnx: No such file or directory
    """
    import onnx.compose

    files = {Path(first): set[Path](), Path(second): set[Path]()}
    before, after = open_model(Path(first), files[Path(first)]), open_model(Path(second), files[Path(second)])
    require_place(Path(path))
    _require_fitting(before, after, io_map)
    fallback = all(_take_functions(model) for model in (before, after))
    held = [_recipes(model, file, recipes.take) for model, file in ((before, first), (after, second))]
    labels = [prefix.rstrip("_./-") or Path(file).stem for prefix, file in zip(prefixes, (first, second), strict=True)]
    state: dict[str, np.ndarray[Any, Any]] = {}
    for model, prefix in zip((before, after), prefixes, strict=True):
        state |= {prefix + name: value for name, value in _take_state(model).items()}
    before.ir_version = after.ir_version = max(before.ir_version, after.ir_version)  # both say the same in either
    aside = Aside()
    for model in (before, after):
        aside.take(model)
    try:
        merged = onnx.compose.merge_models(
            before, after, io_map=list(io_map.items()), prefix1=prefixes[0] or None, prefix2=prefixes[1] or None
        )
    except Exception as error:  # onnx raises several types
        raise ExportError(
            f"{first} and {second} cannot be joined: {error}; give io_map names of outputs of the first and inputs of "
            "the second, and prefixes where both use a name"
        ) from error
    aside.give_places(merged)
    for prefix in filter(None, prefixes):
        names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        rename_values(
            merged,
            {prefix + put + name: put + prefix + name for name in names for put in (stream.INPUT, stream.OUTPUT)},
        )
    if state:
        merged.metadata_props.add(key=stream.KEY, value=stream.encode(state))
    if fallback:
        merged.functions.extend(functions_for(merged))
    recipes.put(merged, recipes.join(held, labels))
    _merge_imports(merged)
    _write(merged, aside, Path(path), files)


def densify(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a file with dense weights and standard operators alone, for tools that know neither functions nor us.

    Functions of standard operators replace its condensed layers, and ONNX Runtime computes what is constant: outputs
    stay what they were up to rounding, the file becomes as large as a dense network's. A layer with values of eight
    bits becomes one of float32 with the weights that they stand for; its samples are rounded to eight bits no more,
    but where layers hand bytes to each other.

    Args:
        source: A file with condensed layers, with or without the functions for a stock ONNX Runtime.
        path: The file to write; it appears whole or not at all. Its weights are in a file beside it where one file
            cannot hold all (2 GiB).

    Raises:
        FormatError: The file cannot be read, or ONNX Runtime refuses it.
        ExportError: Something in the file has no standard form.

    Example:
        >>> densify("missing.onnx", "dense.onnx")
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: cannot read missing.onnx: No such file or directory
    """
    files = {Path(source): set[Path]()}
    model = open_model(Path(source), files[Path(source)])
    require_place(Path(path))
    scaled = {name for name, (base, *_) in abi.operator_names().items() if abi.has_scales(base)}
    kept = [f for f in model.functions if f.domain != abi.DOMAIN or f.name not in scaled]
    present = {(function.domain, function.name) for function in kept}
    del model.functions[:]
    model.functions.extend(kept)
    model.functions.extend(f for f in functions_for(model, exact=False) if (f.domain, f.name) not in present)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".densify-") as folder:
        whole, dense = Path(folder, "whole.onnx"), Path(folder, "dense.onnx")
        aside = Aside()
        aside.take(model)
        aside.give_places(model)
        with writing(whole, model, aside.tensors, "auto"):
            pass
        try:
            _optimise(whole, dense)
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            problem = str(error).replace(str(whole), str(source))
            raise FormatError(f"ONNX Runtime cannot read {source}: {problem}") from error
        result, aside = open_model(dense), Aside()
        domains = {node.domain for node in all_nodes(result.graph)}
        if foreign := sorted(domains - _STANDARD_DOMAINS):
            raise ExportError(f"{source} holds operators of {', '.join(foreign)}, which have no standard form")
        used = [entry for entry in result.opset_import if entry.domain in domains | {""}]
        del result.opset_import[:]
        result.opset_import.extend(used)
        left = [entry for entry in result.metadata_props if entry.key != MARK[0]]
        del result.metadata_props[:]
        result.metadata_props.extend(left)
        result.ir_version = model.ir_version
        aside.take(result)
        aside.give_places(result)
        _write(result, aside, Path(path), files)


def _optimise(source: Path, target: Path) -> None:
    """Have ONNX Runtime write a model with its functions in the place of their calls and its constants computed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    # The next level up fuses operators into ones that only ONNX Runtime has.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    # Beside it, as one file may not hold them; what it is made of is read from there.
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", target.with_suffix(".data").name
    )
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(LARGE))
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def recipe(path: str | os.PathLike[str], part: str | None = None) -> Recipe:
    """The recipe of the model in an ONNX file, for ``sparsify(model, recipe=...)``.

    Args:
        path: A file that ``export_onnx`` wrote, or that tools made of one: most keep a file's metadata.
        part: Where several recipes are in it, of which part: a part of the model that was sparsified by a call of its
            own, or a file that was joined by :func:`merge`. "" is the whole model.

    Raises:
        FormatError: The file cannot be read, is no ONNX file, or holds no such recipe.
        RecipeError: The recipe is damaged, or of a newer version.

    Example:
        >>> import tempfile, torch, srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)), sparsity=0.75).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = sx.export_onnx(model, f"{folder}/model.onnx", (torch.ones(2, 16),), verify=False)
        ...     found = recipe(f"{folder}/model.onnx")
        >>> found == sx.recipe(model)
        True
    """
    found = _recipes(read_model(Path(path)), path, recipes.found)
    if part is None and len(found) == 1:
        return next(iter(found.values()))
    if part in found:
        return found[part]
    if not found:
        raise FormatError(
            f"{path} holds no recipe: its model was dense, it was exported by a release that kept none, or a tool has "
            "dropped the metadata"
        )
    raise FormatError(f"{path} holds {parts_of(found)}")


def _recipes(
    model: "onnx.ModelProto",
    path: str | os.PathLike[str],
    read: "Callable[[onnx.ModelProto], dict[str, Recipe]]",
) -> dict[str, Recipe]:
    """What ``read`` finds in the model of a file, which an error names."""
    try:
        return read(model)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _require_fitting(before: "onnx.ModelProto", after: "onnx.ModelProto", io_map: Mapping[str, str]) -> None:
    """Require of each output and the input that it becomes one type, and sizes that are equal where both are known."""
    given = {entry.name: entry.type.tensor_type for entry in before.graph.output}
    taken = {entry.name: entry.type.tensor_type for entry in after.graph.input}
    for left, right in io_map.items():
        if left not in given or right not in taken:
            continue  # onnx.compose says so
        one, other = given[left], taken[right]
        sized = one.HasField("shape") and other.HasField("shape")
        pairs = list(zip(one.shape.dim, other.shape.dim, strict=False)) if sized else []
        unequal = any(
            a.HasField("dim_value") and b.HasField("dim_value") and a.dim_value != b.dim_value for a, b in pairs
        )
        if one.elem_type != other.elem_type or unequal or (sized and len(one.shape.dim) != len(other.shape.dim)):
            raise ExportError(
                f"the output {left!r} is {_described(one)}, but the input {right!r} that it should become is "
                f"{_described(other)}: connect others in io_map"
            )


def _described(kind: "onnx.TypeProto.Tensor") -> str:
    import onnx

    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "any" for dim in kind.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(kind.elem_type).lower()} ({', '.join(sizes)})"


def _take_functions(model: "onnx.ModelProto") -> bool:
    """Take the functions for a stock ONNX Runtime out of a model; return whether there was one for each operator.

    Those that a tool has renamed stay: they are what computes their layers, densely.
    """
    known = dict.fromkeys(abi.OPERATORS)
    called = {node.op_type for node in all_nodes(model.graph) if node.domain == abi.DOMAIN} & known.keys()
    ours = {function.name for function in model.functions if function.domain == abi.DOMAIN} & known.keys()
    others = [f for f in model.functions if f.domain != abi.DOMAIN or f.name not in known]
    del model.functions[:]
    model.functions.extend(others)
    return ours >= called


def _take_state(model: "onnx.ModelProto") -> "dict[str, np.ndarray[Any, Any]]":
    """Take out of a model's metadata what its state begins with."""
    held = [entry for entry in model.metadata_props if entry.key == stream.KEY]
    left = [entry for entry in model.metadata_props if entry.key != stream.KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(left)
    try:
        return stream.decode(held[0].value) if held else {}
    except Exception as error:  # the file is untrusted: anything
        raise FormatError(f"the file's state is malformed ({error}); export the model anew") from error


def _merge_imports(model: "onnx.ModelProto") -> None:
    """Name each domain once: ``onnx.compose`` leaves those of both models standing."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    del model.opset_import[:]
    for domain, version in versions.items():
        model.opset_import.add(domain=domain, version=version)


def _write(model: "onnx.ModelProto", aside: Aside, path: Path, files: Mapping[Path, set[Path]]) -> None:
    """Write a model, which keeps its large constants in a file beside it where one file cannot hold all.

    ``files`` are those that its sources keep tensors in; a source in whose place it is written is to be lost.
    """
    require_place(path)
    spared = set[Path]().union(*(own for source, own in files.items() if place_of(source) != place_of(path)))
    with writing(path, model, aside.tensors, "auto", spared):
        pass
