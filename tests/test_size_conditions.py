"""What sizes must satisfy beside ranges: found in a trace, checked at calls of lowered modules, and by files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import sympy
import torch
from test_dynamic_shapes import check_file, check_same, lowered, sessions, sparse
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.inputs import is_description
from srigl_fx.onnx_export.limits import limit_sizes, limits_in
from srigl_fx.passes.guards import conditions_of
from srigl_fx.passes.sizes import Condition, Size, Sizes


@pytest.mark.parametrize(
    ("text", "words", "right", "wrong"),
    [
        ("a % 8 == 0", "a must be a multiple of 8", {"a": 16}, {"a": 12}),
        ("a + -1 % 2 == 0", "a + -1 must be a multiple of 2", {"a": 5}, {"a": 4}),
        ("a + b % 3 != 0", "a + b must not be a multiple of 3", {"a": 2, "b": 2}, {"a": 2, "b": 4}),
        ("a + -1*b >= 0", "a must be at least b", {"a": 2, "b": 2}, {"a": 2, "b": 3}),
        ("a + -2*b + 3 >= 0", "a + 3 must be at least 2*b", {"a": 1, "b": 2}, {"a": 1, "b": 3}),
        ("-1*a + 9 >= 0", "9 must be at least a", {"a": 9}, {"a": 10}),
        ("a + -1*b != 0", "a must not be b", {"a": 2, "b": 3}, {"a": 2, "b": 2}),
        ("2*a + -3*b == 0", "2*a must be 3*b", {"a": 3, "b": 2}, {"a": 2, "b": 3}),
    ],
)
def test_conditions_are_written_as_they_are_read(
    text: str, words: str, right: dict[str, int], wrong: dict[str, int], tmp_path: Path
) -> None:
    """And hold or do not, in a file too."""
    condition = Condition.parse(text)
    assert (str(condition), condition.words) == (text, words)
    assert condition.holds(right)
    assert not condition.holds(wrong)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n, a] x, float[b] y) => (float[n, a] z, float[b] w) '
        "{z = Neg(x) w = Neg(y)}"
    )
    limit_sizes(model, [{1: Size.named("a")}, {0: Size.named("b")}], {"a": (1, 99)}, [condition])
    onnx.checker.check_model(model)
    assert limits_in(model) == {"a": (1, 99)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(values: dict[str, int]) -> Any:
        arrays = {"x": np.ones((2, values["a"]), np.float32), "y": np.ones(values.get("b", 1), np.float32)}
        return session.run(None, arrays)

    assert run(right)[0].shape == (2, right["a"])
    with pytest.raises(Exception, match=rf"{words.replace('*', '[*]').replace('+', '[+]')}, where a is axis 1 of x"):
        run(wrong)


@pytest.mark.parametrize("text", ["a % 1 == 0", "a % 8 >= 0", "a > 0", "a == 1", "", "a b == 0", "3 == 0", "a %8 == 0"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no condition on sizes|is not the size of an axis"):
        Condition.parse(text)


def test_descriptions_in_files_have_conditions_that_are_some() -> None:
    described = {"dtype": "float32", "shape": ["a", 3]}
    assert is_description({**described, "conditions": ["a % 8 == 0"]})
    assert not is_description({**described, "conditions": "a % 8 == 0"})
    assert not is_description({**described, "conditions": [8]})
    with pytest.raises(ValueError, match="is no condition"):
        is_description({**described, "conditions": ["a is even"]})


def test_conditions_of_sizes_that_are_made_one() -> None:
    conditions = tuple(map(Condition.parse, ["a + -1*b != 0", "a + -1*c != 0"]))
    sizes = Sizes(axes=tuple({0: Size.named(name)} for name in "abc"), conditions=conditions)
    assert [one.words for one in sizes.with_one(["b", "a"]).conditions] == ["b must not be c"]


A, B = sympy.symbols("a b", integer=True, positive=True)


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (A < B, ["b must be at least a + 1"]),
        (B >= A + 3, ["b must be at least a + 3"]),
        (sympy.Ne(A, B), ["a must not be b"]),
        (sympy.Ne(A, 5), ["a must not be 5"]),
        (sympy.Ne(A, 1), []),
        (A >= 2, []),
        (sympy.Eq(sympy.Mod(A, 4), 0), ["a must be a multiple of 4"]),
        (sympy.Ne(sympy.Mod(B, 2), 0), ["b + -1 must be a multiple of 2"]),
        (sympy.Eq(A * B, 4 * B * sympy.floor(A / 4)), ["a must be a multiple of 4"]),
        (sympy.Eq(sympy.Mod(A * B, 8), 0), []),  # either may be more of a multiple where the other is less
        (sympy.Eq(sympy.Mod(A, B), 0), []),
        (A * B >= 2, []),
        (sympy.true, []),
        (sympy.Eq(sympy.Symbol("unknown"), A), []),
    ],
)
def test_conditions_of_guards(guard: Any, words: list[str]) -> None:
    assert [one.words for one in conditions_of([guard], {"a": 8, "b": 11})] == words


class Tied(nn.Module):
    """Blocks of four, rows that must be there, and a decision by two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, table: Tensor, few: Tensor) -> Tensor:
        y: Tensor = self.fc(x.reshape(x.shape[0], x.shape[1] // 4, 4, 6).sum(2)).sum(1)
        y = y * 2 if x.shape[0] == table.shape[0] else y
        return y + (few.T @ table[: few.shape[0]]).sum(0)


def given(n: int = 2, t: int = 8, rows: int = 7, few: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, t, 6), torch.randn(rows, 5), torch.randn(few, 5)


BROKEN = {
    "t": (given(t=10), r"t 10 \(axis 1 of x\), and t must be a multiple of 4", "t must be a multiple of 4, where"),
    "few": (
        given(few=8),
        r"rows 7 \(axis 0 of table\), few 8 \(axis 0 of few\), and rows must be at least few",
        "rows must be at least few, where",
    ),
    "n": (given(n=7), r"n 7 \(axis 0 of x\), rows 7 \(axis 0 of table\), and n must not be rows", "n must not be rows"),
}


@pytest.mark.long
def test_calls_that_break_a_condition_are_refused(tmp_path: Path) -> None:
    """By a lowered module, one that was saved, and a file; what only happened to be so in the example is none."""
    model = sparse(Tied())
    shapes = {"x": {0: "n", 1: "t"}, "table": {0: "rows"}, "few": {0: "few"}}
    made = lowered(model, given(), shapes)
    made.save(tmp_path / "m.srigl")
    loaded = sx.load_lowered(tmp_path / "m.srigl")
    sx.export_onnx(made, tmp_path / "m.onnx", given())
    fine = [given(), given(1, 4, 3, 3), given(5, 12, 4, 2), given(8, 8, 9, 8)]
    for inputs in fine:
        check_same(model, made, *inputs)
        check_same(model, loaded, *inputs)
        check_file(tmp_path / "m.onnx", model, *inputs)
    assert "t must be a multiple of 4, tried at 4, 8, 12" in str(made.report)
    for inputs, said, in_file in BROKEN.values():
        for module in (made, loaded):
            with pytest.raises(LoweringError, match=said):
                module(*inputs)
        arrays = dict(zip(("x", "table", "few"), (one.numpy() for one in inputs), strict=True))
        for session in sessions(tmp_path / "m.onnx"):
            with pytest.raises(Exception, match=in_file):
                session.run(None, arrays)


class _Stacked(nn.Module):
    """Two images of each sample go through one layer together, as in networks of optical flow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        first, second = torch.chunk(self.layer(torch.cat([one, other])), 2)
        return torch.sub(first, second)


def test_stacked_samples_that_are_taken_apart_are_of_any_number() -> None:
    model = sx.sparsify(_Stacked(), sparsity=0.5).eval()
    made = sx.lower(model, (torch.randn(2, 8), torch.randn(2, 8)), min_speedup=0)
    inputs = torch.randn(2, 3, 8).unbind()
    with torch.no_grad():
        torch.testing.assert_close(made(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
