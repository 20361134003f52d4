"""A failing test says by its name what does not hold: no numbers of lists that nobody has, no "<lambda>"."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("compute", [lambda x: x + 1, lambda x: [x][0], lambda x: (lambda y: y)(x)])
def test_an_anonymous_parameter_is_named_by_what_it_computes(
    compute: Callable[[int], int], request: pytest.FixtureRequest
) -> None:
    names = {2: "x + 1", 1: "[x][0]"}
    assert request.node.name.endswith((f"[{names[compute(1)]}]", "[(lambda y: y)(x)]"))


@pytest.mark.long
def test_no_test_is_named_by_a_number() -> None:
    """The rules of a pass are numbered in its docstring, and may be named by that."""
    named = [
        f"{path.name}: {node.name}"
        for path in sorted(Path(__file__).parent.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and re.match(r"test_[a-z]?\d+(_|$)", node.name)
    ]
    assert named == []
