"""What removal at a batch of two leaves is right at any batch, also where batch and channels are one axis."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from passes_support import masked, relative_error, removed, shapes
from torch import Tensor, nn

import srigl_fx as sx

DEAD = [0, 3, 5, 6, 11, 17, 20, 23]  # of 24

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda y: y.reshape(-1).view(y.shape),
    "ravel": lambda y: y.ravel().view(y.shape),
    "a column": lambda y: y.view(-1, 1).view(y.shape),
    "unflatten": lambda y: torch.unflatten(y.flatten(), 0, y.shape),
    "expand": lambda y: y.reshape(-1).expand(2, -1).mean(0).view(y.shape),
    "flip": lambda y: y.reshape(-1).flip(0).view(y.shape).flip(0, 1, 2),
    "softmax of ones": lambda y: y * y.reshape(-1, 1).softmax(1).view(y.shape),
    "batch in the middle": lambda y: y.transpose(0, 1).reshape(5, -1).view(5, -1, 24).transpose(0, 1),
}


class Moved(nn.Module):
    """Two layers, with something between them that puts channels into one axis with the batch."""

    def __init__(self, move: Callable[[Tensor], Tensor], a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.move = a, b, move

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.move(torch.relu(self.a(x))))
        return y


def linears(move: Callable[[Tensor], Tensor], dead: list[int] = DEAD) -> nn.Module:
    return masked(Moved(move, nn.Linear(12, 24), nn.Linear(24, 16)), {"a.weight": dead})


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", MOVES)
def test_an_axis_of_batch_and_channels_stays_free(name: str, batch: int) -> None:
    model = linears(MOVES[name])
    result = removed(model, (torch.randn(batch, 5, 12),))
    assert not result.notes
    assert result.subject.dynamic
    assert shapes(result.subject, "linear") == [(16, 12), (16, 16)]
    for size in (None, 1, 2, 3, 7):
        assert relative_error(model, result.subject, size) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_softmax_over_places_of_images_and_channels(batch: int) -> None:
    places = Moved(lambda y: y.view(-1, 30).softmax(1).view(y.shape), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    model = masked(places, {"a.weight": [0, 3, 6]})
    program = removed(model, (torch.randn(batch, 3, 5, 6),)).subject
    assert shapes(program, "conv2d") == [(5, 3, 1, 1), (4, 5, 1, 1)]
    for size in (None, 1, 2, 3, 7):
        assert relative_error(model, program, size) < 1e-6


@pytest.mark.slow
def test_heads_beside_the_batch_go() -> None:
    """One of four heads is dead; the axis of batch and heads is only turned, which counts no positions."""

    def heads(y: Tensor) -> Tensor:
        apart = y.view(-1, 5, 4, 6).transpose(1, 2).reshape(-1, 5, 6).transpose(1, 2)
        return apart.transpose(1, 2).view(-1, 4, 5, 6).transpose(1, 2).reshape(y.shape)

    model = linears(heads, list(range(6, 12)))
    program = removed(model, (torch.randn(2, 5, 12),)).subject
    assert shapes(program, "linear") == [(18, 12), (16, 18)]
    for size in (None, 1, 3, 7):
        assert relative_error(model, program, size) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "move",
    [
        lambda y: y.reshape(-1).roll(48).view(y.shape),  # at a batch of two all around, before and after
        lambda y: y.reshape(-1)[-24:].view(1, 24),
        lambda y: y.reshape(-1)[24:].view(-1, 24),
    ],
    ids=["roll", "the last", "all but the first"],
)
def test_positions_are_not_counted_along_the_batch(move: Callable[[Tensor], Tensor]) -> None:
    model = linears(move, list(range(0, 24, 2)))
    result = removed(model, (torch.randn(3, 12),))
    assert not any(note.undone for note in result.notes)
    for size in (None, 2, 5, 7):
        assert relative_error(model, result.subject, size) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 2])
def test_lowered_and_exported_it_takes_any_batch(batch: int, tmp_path: Path) -> None:
    model, x = linears(MOVES["reshape"]), torch.randn(batch, 5, 12)
    lowered = sx.lower(model, (x,), min_speedup=0)
    assert not lowered.report.undone
    sx.export_onnx(model, tmp_path / "model.onnx", (x,), min_speedup=0)
    session = sx.runtime.load(tmp_path / "model.onnx")
    for size in (1, 2, 5):
        more = torch.randn(size, 5, 12)
        torch.testing.assert_close(lowered(more), model(more))
        (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(more).detach())
