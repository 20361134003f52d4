"""Text that every machine with this project has: the doc strings of Python's standard library and of a few packages.

Owns what is read, and how it is split into training text and held-out pairs: the first paragraph of a doc string, and
what comes after it. It must not know any model.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("networkx", "numpy", "scipy", "sklearn")  # which PyTorch and the extra [demo] bring along
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
FOLD = 4  # of so many files one is held out
LEAST_WORDS = (3, 8)  # of a first paragraph, and of the rest

Pair = tuple[str, str]


@dataclass(frozen=True)
class Texts:
    """Pairs of the files to train on, and of those that are held out, in the order of the files."""

    train: Sequence[Pair]
    held_out: Sequence[Pair]


def read() -> Texts:
    """All pairs that there are. Where a first paragraph or a rest comes again, only the first one with it is taken."""
    train, held_out, seen = list[Pair](), list[Pair](), set[str]()
    for index, file in enumerate(_files()):
        for found in pairs(file.read_text(encoding="utf-8", errors="replace")):
            if seen.isdisjoint(found):
                seen.update(found)
                (held_out if index % FOLD == 1 else train).append(found)
    return Texts(train, held_out)


def _files() -> Iterator[Path]:
    """The modules in alphabetical order, package after package."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        if (spec := find_spec(name)) and spec.submodule_search_locations:
            roots.extend(map(Path, spec.submodule_search_locations))
    for root in roots:
        yield from sorted(file for file in root.rglob("*.py") if LEFT_OUT.isdisjoint(file.relative_to(root).parts))


def pairs(source: str) -> Iterator[Pair]:
    r"""The first paragraph and the rest of each doc string that has both, on one line each; none of a broken module.

    Example:
        >>> text = "Sort the list.\n\n    In place and stable: equal items\n    keep their order."
        >>> list(pairs(f"def sort(self): {text!r}"))
        [('Sort the list.', 'In place and stable: equal items keep their order.')]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings, which are not ours
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in _documented(tree):
        first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
        words = first.split(), rest.split()
        if all(len(part) >= least for part, least in zip(words, LEAST_WORDS, strict=True)):
            yield " ".join(words[0]), " ".join(words[1])


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module or class or function, and the classes and functions that are defined directly in it, and in these."""
    yield node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(inner)


def spread(found: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the pairs, or all if there are fewer, evenly spread.

    Example:
        >>> spread([("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")], 2)
        [('a', 'b'), ('e', 'f')]
    """
    return [found[index * len(found) // count] for index in range(count)] if count < len(found) else list(found)
