"""Who may import whom: the picture in docs/architecture.md, checked on the source.

Every import counts, those inside functions too. A rule says what a part of the package may import of the rest.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from srigl_fx.passes.operators import OPERATORS
from srigl_fx.passes.pipelines import CONDENSING, LOWERING

VERBS = (
    "sparsification",
    "adoption",
    "pruning",
    "distillation",
    "lowering.pipeline",
    "onnx_condensing.pipeline",
    "onnx_export.pipeline",
    "onnx_tools",
)
FACE = ("cli", "demo")  # with the package's __init__, the only ones that see everything
COMMON = ("errors", "files", "reports.text_tables", "specs")

# part -> what it may import of ours, by prefix; itself is always allowed
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "files": (),
    "comparison": (),
    "compatibility": ("errors",),
    "specs": ("errors", "masks"),
    "masks": ("errors",),
    "nn": ("masks", "runtime.format", *COMMON),
    "train": ("masks", "nn", "recipe_parts", "recipes", "runtime.cpu.training_products", *COMMON),
    "recipes": ("masks", *COMMON),
    "recipe_parts": ("errors", "recipes"),
    "reordering": ("comparison", "masks", "passes", "reports", *COMMON),
    "restoration": ("masks", "passes", "recipes", "train", *COMMON),
    "integrations": ("masks", "nn", "recipe_parts", "recipes", "restoration", "train", *COMMON),
    "adoption": ("compatibility", "masks", "passes", "recipes", "train", *COMMON),
    "pruning": ("compatibility", "masks", "passes", "reports.text_tables", "sparsification", "train", *COMMON),
    "distillation": ("compatibility", "distillation_loss", "masks", "passes", "train", *COMMON),
    "distillation_loss": ("errors", "passes.wrappers"),
    "sparsification": ("compatibility", "masks", "nn", "passes", "recipes", "train", *COMMON),
    "passes": (
        *("masks", "nn", "comparison", *COMMON),
        *("runtime.activations", "runtime.format", "runtime.quantisation", "runtime.cpu.kernels.plan", "runtime.ops"),
        *("runtime.arranged", "runtime.row_lengths"),
    ),
    "runtime": ("masks", *COMMON),
    "runtime.activations": ("errors",),
    "runtime.value_types": ("runtime.quantisation",),
    "runtime.quantisation": (),
    "runtime.validation": (
        *("errors", "runtime.activations", "runtime.format", "runtime.quantisation", "runtime.value_types"),
        "runtime.cpu.kernels.plan",
    ),
    "runtime.arranged": ("runtime.cpu.kernels.isa", "runtime.cpu.kernels.plan"),
    "runtime.format": ("errors", "runtime.quantisation", "runtime.value_types"),
    "runtime.row_lengths": ("runtime.cpu.kernels.plan",),
    "runtime.cpu.kernels": ("errors", "runtime.activations", "runtime.quantisation", "runtime.value_types"),
    "runtime.cuda.kernels": ("errors", "runtime.activations"),
    "runtime.cuda.packed": ("errors", "runtime.format", "runtime.quantisation", "runtime.value_types"),
    "runtime.cuda.table": ("runtime.value_types",),
    "runtime.cuda.model": ("runtime.cuda.table",),
    "runtime.cuda.plan": ("errors", "runtime.cuda.model", "runtime.cuda.packed", "runtime.cuda.table"),
    "runtime.cuda.driver": ("errors", "runtime.cuda.model"),
    "runtime.reference": ("errors", "runtime.activations", "runtime.quantisation"),
    "lowering": (
        *("comparison", "compatibility", "masks", "nn", "passes", "recipe_parts", "recipes", "reports", "runtime"),
        *COMMON,
    ),
    "onnx_export": (
        "comparison",
        "compatibility",
        "lowering",
        "passes",
        "recipe_parts",
        "recipes",
        "reports.sizes",
        "runtime.format",
        "runtime.ops",
        "runtime.ort",
        "runtime.value_types",
        *COMMON,
    ),
    "onnx_condensing": (
        *("onnx_export", "reports", "runtime.activations", "runtime.costs.cost_model", "runtime.format", "runtime.ort"),
        *("runtime.quantisation", "runtime.row_lengths"),
        *COMMON,
    ),
    "serving": ("errors", "onnx_export.tensor_types", "runtime.ort"),
    "onnx_tools": ("onnx_export", "recipe_parts", "recipes", "runtime.ort", *COMMON),
    "reports": ("files", "passes.removal", "passes.sizes"),
    "summaries": ("lowering.lowered", "masks", "reports", *COMMON),
}
HANDFUL = 6  # operators that a file of the passes may name together
KERNELS_KNOW_NOT = {"torch", "onnx", "onnxruntime", "onnxscript"}
LIGHT_IMPORT_LEAVES_OUT = (
    "numba",
    "llvmlite",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "transformers",
    "lightning",
    "matplotlib",
    "sklearn",
    "typer",
    "rich",
)


def _sources(checkout: Path) -> dict[str, Path]:
    """Dotted name below ``srigl_fx`` ("" for the package itself) -> file."""
    found = {}
    for folder, prefix in (("srigl_fx", ()), ("passes", ("passes",)), ("runtime", ("runtime",))):
        for path in sorted((checkout / folder).rglob("*.py")):
            parts = path.relative_to(checkout / folder).with_suffix("").parts
            if folder == "srigl_fx" and parts[0] in {"passes", "runtime"}:
                continue
            found[".".join(part for part in (*prefix, *parts) if part != "__init__")] = path
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def trees(checkout: Path) -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in _sources(checkout).items()}


@pytest.fixture(scope="module")
def graph(trees: dict[str, ast.Module]) -> "nx.DiGraph[str]":
    """An edge from each module to each of our modules that it imports."""
    edges: nx.DiGraph[str] = nx.DiGraph()
    edges.add_nodes_from(trees)
    for name, tree in trees.items():
        for target in _imports(tree):
            if target.split(".")[0] != "srigl_fx":
                continue
            inner = target.removeprefix("srigl_fx").removeprefix(".")
            while inner not in trees:  # a name inside a module: the module
                inner = inner.rpartition(".")[0]
            if inner != name:
                edges.add_edge(name, inner)
    return edges


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


@pytest.mark.long
def test_every_file_has_a_rule(trees: dict[str, ast.Module]) -> None:
    ruled = (*MAY_IMPORT, *FACE)
    assert [name for name in trees if name and not any(_within(name, part) for part in ruled)] == []
    assert all(any(_within(name, part) for name in trees) for part in (*ruled, *VERBS)), "a rule is for no file"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_it_may(graph: "nx.DiGraph[str]", part: str) -> None:
    allowed = (part, *MAY_IMPORT[part])
    wrong = [
        f"{source} imports {target}"
        for source, target in graph.edges
        if _within(source, part) and target and not any(_within(target, prefix) for prefix in allowed)
    ]
    assert not wrong


def test_only_the_face_sees_the_verbs(graph: "nx.DiGraph[str]") -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in graph.edges
        if any(_within(target, verb) for verb in VERBS)
        and source
        and not any(_within(source, part) for part in (*VERBS, *FACE))
    ]
    assert not wrong


def test_nothing_imports_the_face(graph: "nx.DiGraph[str]") -> None:
    wrong = [
        f"{source} imports {target or 'srigl_fx'}"
        for source, target in graph.edges
        if (not target or any(_within(target, part) for part in FACE))
        and not any(_within(source, part) for part in FACE)
    ]
    assert not wrong


def test_no_cycles_between_packages(graph: "nx.DiGraph[str]") -> None:
    packages: nx.DiGraph[str] = nx.DiGraph()
    for source, target in graph.edges:
        if source and target and source.split(".")[0] != target.split(".")[0]:
            packages.add_edge(source.split(".")[0], target.split(".")[0])
    assert list(nx.simple_cycles(packages)) == []


def test_no_cycles_between_modules(graph: "nx.DiGraph[str]") -> None:
    without_packages = graph.subgraph(name for name in graph if name)
    assert list(nx.simple_cycles(without_packages)) == []


def test_kernels_know_neither_torch_nor_onnx(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        if _within(name, "runtime.cpu.kernels") or _within(name, "runtime.cuda.kernels")
        for target in _imports(tree)
        if target.split(".")[0] in KERNELS_KNOW_NOT
    ]
    assert not wrong


def test_the_library_does_not_print(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        if not any(_within(name, part) for part in FACE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_every_module_says_what_it_owns(trees: dict[str, ast.Module]) -> None:
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def _operators_in(tree: ast.Module) -> Iterator[tuple[int, set[str]]]:
    """Line and operators of each collection of names that is written down."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            members = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Set | ast.List | ast.Tuple):
            members = node.elts
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > HANDFUL:
            words = node.value.split()
            members = [ast.Constant(word) for word in words] if set(words) <= set(OPERATORS) else []
        else:
            continue
        found = {part for member in members for part in ast.unparse(member).replace("'", ".").split(".")}
        yield node.lineno, found & set(OPERATORS)


def test_one_table_says_what_operators_do(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{name}:{line} names {sorted(found)}: ask srigl_fx.passes.operators"
        for name, tree in trees.items()
        if _within(name, "passes") and name != "passes.operators"
        for line, found in _operators_in(tree)
        if len(found) > HANDFUL
    ]
    assert not wrong


def test_import_is_light() -> None:
    code = f"import sys, srigl_fx; print([name for name in {LIGHT_IMPORT_LEAVES_OUT!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_serving_a_lowered_model_imports_little() -> None:
    """Numba is for building the operator library, and what finds dead channels or captures graphs for lowering."""
    heavy = ("numba", "llvmlite", "networkx", "sympy", "onnx", "onnxruntime", "scipy", "srigl_fx.lowering.pipeline")
    code = f"import sys, srigl_fx as sx; sx.load_lowered; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_looking_at_a_file_imports_little() -> None:
    heavy = ("torch", "numba", "onnxruntime", "onnx_ir")
    code = f"import sys, srigl_fx.onnx_export.file; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_modules_of_the_package_need_no_import_of_their_own() -> None:
    names = ("masks", "train", "passes", "runtime", "errors", "onnx_tools")
    code = f"import srigl_fx as sx; print(all(getattr(sx, n).__name__ == 'srigl_fx.' + n for n in {names}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def _named_files(page: str) -> set[str]:
    """The files that a page names: with their folder in its text, below it in the list of all files."""
    text = page.partition("## Every file")[0]
    named = {name for name in re.findall(r"`([\w/]+/\w+\.py)`", text) if not name.startswith("tests/")}
    return named.union(_listed_files(page))


def _listed_files(page: str) -> Iterator[str]:
    folder = ""
    for line in page.partition("## Every file")[2].partition("```text")[2].splitlines():
        folder = line if line.endswith("/") else folder
        yield from (folder + name for name in re.findall(r"\b\w+\.py\b", line))


def test_the_page_names_every_file_and_no_other(checkout: Path) -> None:
    page = (checkout / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.relative_to(checkout).as_posix() for path in _sources(checkout).values()}
    assert _named_files(page) == {name for name in files if not name.endswith("/__init__.py")}
    listed = _named_files("## Every file" + page.partition("## Every file")[2])
    assert _named_files(page) == listed, "the text names a file that the list lacks"


def test_the_page_lists_every_file_once(checkout: Path) -> None:
    page = (checkout / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name, count in Counter(_listed_files(page)).items() if count > 1] == []


def test_the_picture_shows_the_passes_of_lower_in_their_order(checkout: Path) -> None:
    page = (checkout / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("```text")[2].partition("```")[0].replace("-", " ")
    passes = [re.sub(r"\B(?=[A-Z])", " ", step.name).lower() for step in (*LOWERING, *CONDENSING)]
    assert re.search(r"\b.*\b".join(passes), picture, re.DOTALL), passes


def test_files_are_found_in_text_and_list() -> None:
    listed = "## Every file\n```text\npasses/\n  base.py draft.py   two\nruntime/\n  base.py  another\n```\n"
    names = {"passes/gone.py", "passes/base.py", "passes/draft.py", "runtime/base.py"}
    assert _named_files(f"`passes/gone.py`\n{listed}") == names
