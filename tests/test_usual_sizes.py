"""Which sizes are free where nobody says so, and what becomes of calls with others than a graph is right for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import srigl_fx as sx
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.inputs import is_description
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.usual_sizes import token_lengths


def lowered(model: nn.Module, *inputs: Tensor, **options: Any) -> LoweredModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    made = sx.lower(sx.sparsify(model, sparsity=0.5).eval(), inputs, min_speedup=0, **options)
    assert isinstance(made, LoweredModule)
    return made


def shapes(made: LoweredModule) -> list[list[int | str]]:
    return [one["shape"] for one in made.inputs if one]


def ids(samples: int, length: int) -> Tensor:
    return torch.arange(samples * length).reshape(samples, length) % 9


class Tokens(nn.Module):
    """A layer behind an embedding, a table of twelve positions, and a mask of which it reads as many samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.fc = nn.Embedding(9, 8), nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        y: Tensor = self.fc(x) * mask[torch.arange(ids.shape[0])][..., None]
        return y


@pytest.mark.long
@pytest.mark.parametrize("samples", [1, 2])
def test_tokens_are_free_up_to_the_length_of_the_table(samples: int, tmp_path: Path) -> None:
    model = Tokens()
    made = lowered(model, ids(samples, 6), torch.rand(samples, 6))
    assert shapes(made) == [["batch", "ids_1"], ["batch", "ids_1"]]
    assert [(one.name, one.least, one.most) for one in made.report.free_sizes] == [("batch", 1, None), ("ids_1", 1, 12)]
    assert not made.report.fixed_sizes
    path = tmp_path / "tokens.onnx"
    report = sx.export_onnx(made, path, (ids(samples, 6), torch.rand(samples, 6)))
    assert report.outputs == {"output": ("batch", "ids_1", 4)}
    made.save(tmp_path / "tokens.srigl")
    again = sx.load_lowered(tmp_path / "tokens.srigl")
    sessions = [sx.runtime.load(path), onnxruntime.InferenceSession(path)]
    for count, length in ((1, 1), (3, 12), (2, 7)):
        given = ids(count, length), torch.rand(count, length)
        with torch.no_grad():
            expected = model(*given)
            for one in (made, again):
                torch.testing.assert_close(one(*given), expected)
        for session in sessions:
            (served,) = session.run(None, {"ids": given[0].numpy(), "mask": given[1].numpy()})
            np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)
    given = ids(2, 13), torch.rand(2, 13)
    for one in (made, again):
        for gradients in (True, False):
            with (
                torch.set_grad_enabled(gradients),
                pytest.raises(LoweringError, match="ids_1 13, and the graph is right from 1 to 12"),
            ):
                one(*given)
    for session in sessions:
        with pytest.raises(Exception, match="the size ids_1 must be from 1 to 12"):
            session.run(None, {"ids": given[0].numpy(), "mask": given[1].numpy()})


class Reshapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(9, 4), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.fc(self.words(ids).flatten(1))
        return y


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(9, 4), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        state = torch.zeros(ids.shape[0], 4)
        for step in range(ids.shape[1]):
            state = torch.tanh(self.cell(torch.cat([state, self.words(ids[:, step])], 1)))
        return state


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Reshapes, "`y: Tensor = self.fc(self.words(ids).flatten(1))`: mat1"),
        (Loops, "`for step in range(ids.shape[1]):`"),
    ],
)
def test_a_length_that_the_model_ties_is_as_in_the_example_and_its_line_is_told(
    model: Callable[[], nn.Module], line: str
) -> None:
    made = lowered(model(), ids(2, 6))
    assert shapes(made) == [["batch", 6]]
    (fixed,) = made.report.fixed_sizes
    assert (fixed.axis, fixed.size) == ("ids axis 1", 6)
    assert "test_usual_sizes.py, line" in fixed.reason
    assert line in fixed.reason
    assert f"ids axis 1 is 6: {fixed.reason}" in str(made.report)
    assert made(ids(5, 6)).shape[0] == 5


class Mixed(nn.Module):
    """Tokens beside features, as many of both."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(9, 4), nn.Linear(6, 4)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        y: Tensor = self.words(ids).mean(1) + self.fc(features)
        return y


@pytest.mark.long
def test_features_that_are_as_many_by_chance_tie_no_tokens() -> None:
    made = lowered(Mixed(), ids(2, 6), torch.rand(2, 6))
    assert shapes(made) == [["batch", "ids_1"], ["batch", 6]]
    made = lowered(Mixed(), ids(2, 6), torch.rand(2, 6), dynamic_shapes={})
    assert shapes(made) == [[2, 6], [2, 6]]


B, L = 3, 7
TAKEN: dict[str, tuple[list[Any], list[int]]] = {
    "tokens, mask, types": ([ids(B, L), torch.ones(B, L), torch.zeros(B, L, dtype=torch.bool)], [0, 1, 2]),
    "positions for all samples": ([ids(B, L), ids(1, L)], [0, 1]),
    "two lengths": ([ids(B, L), ids(B, 5), torch.ones(B, 5)], [0, 1, 2]),
    "features": ([ids(B, L), torch.ones(B, 4), torch.ones(B, L, 4)], [0]),
    "images and texts": ([torch.ones(B, 3, 8, 8), ids(B, L)], [1]),
    "edges": ([torch.ones(B, 4), ids(2, 9)], []),
    "labels": ([torch.ones(B, 4), torch.arange(B), ids(B, 1)], []),
    "floats alone": ([torch.ones(B, L), torch.ones(B, L)], []),
    "numbers": ([3, torch.tensor(3), torch.ones(B, L)], []),
    "none": ([], []),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken_for_tokens(case: str) -> None:
    leaves, expected = TAKEN[case]
    assert list(token_lengths(leaves)) == expected


class Halves(nn.Module):
    """Something else with a single row than with several."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if x.shape[1] > 1 else -y


@pytest.mark.long
def test_a_range_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    example = torch.randn(2, 5, 4)
    with pytest.raises(LoweringError, match=r"t was to be from 1 to 8, and the graph .* from 2 to 8 \(axis 1 .*narrow"):
        lowered(Halves(), example, dynamic_shapes={"x": {1: Dim("t", min=1, max=8)}})
    made = lowered(Halves(), example, dynamic_shapes={"x": {1: Dim("t", max=8)}})
    (size,) = made.report.free_sizes
    assert (size.least, size.most) == (2, 8)
    assert made.inputs == [{"dtype": "float32", "shape": [2, "t", 4], "limits": {"t": [2, 8]}}]
    sx.export_onnx(made, tmp_path / "t.onnx", (example,))
    session = sx.runtime.load(tmp_path / "t.onnx")
    for length, fits in ((1, False), (2, True), (8, True), (9, False)):
        x = torch.randn(2, length, 4)
        if fits:
            with torch.no_grad():
                np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], made(x), rtol=1e-4, atol=1e-5)
            continue
        with pytest.raises(LoweringError, match=f"has t {length}, and the graph is right from 2 to 8"):
            made(x)
        with pytest.raises(Exception, match="the size t must be from 2 to 8"):
            session.run(None, {"x": x.numpy()})


class Picks(nn.Module):
    """Something else at one size alone, which no range says."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.fc(self.words(ids))
        return -y if ids.shape[1] == 7 else y


@pytest.mark.long
def test_a_size_at_which_the_graph_is_silently_wrong_is_not_free() -> None:
    made = lowered(Picks(), ids(2, 6))
    assert shapes(made) == [["batch", 6]]
    assert "at batch 2, ids_1 7: output 0 is another" in made.report.fixed_sizes[0].reason
    with pytest.raises(LoweringError, match=r"there are sizes at which the graph is wrong: .* t 7.*a smaller range"):
        lowered(Picks(), ids(2, 6), dynamic_shapes={"ids": {1: "t"}})
    made = lowered(Picks(), ids(2, 6), dynamic_shapes={"ids": {1: Dim("t", max=6)}})
    assert made.inputs[0] == {"dtype": "int64", "shape": [2, "t"], "limits": {"t": [1, 6]}}


@pytest.mark.parametrize("limits", [{"n": [1, "9"]}, {"n": ["1", None]}, {"m": [1, 9]}, {"n": [1.0, 9]}])
def test_limits_of_a_file_are_looked_at(limits: Any) -> None:
    described = {"dtype": "float32", "shape": ["n", 3]}
    assert is_description({**described, "limits": {"n": [1, 9]}})
    assert is_description({**described, "limits": {"n": [2, None]}})
    assert not is_description({**described, "limits": limits})
