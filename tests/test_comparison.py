"""What lowering and export take for equal."""

import math

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import Results, compare, relative_error

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        (2.0, 2.5, 0.25),
        (-4.0, -3.0, 0.25),
        (0.0, 0.0, 0.0),
        (0.0, 1e-9, INF),
        (1.0, NAN, INF),
        (NAN, NAN, 0.0),
        (INF, INF, 0.0),
        (INF, -INF, INF),
        (3 + 4j, 3 + 3j, 0.2),
        (2, 2, 0.0),
        (2, 3, INF),
        (True, False, INF),
        (2.0, 2, 0.0),
        (2.0, "2.0", INF),
        (2.0, torch.tensor(2.0), INF),
        ("mean", "mean", 0.0),
        (None, None, 0.0),
        (torch.tensor([3 + 4j, 1]), torch.tensor([3 + 4j, 2]), 0.2),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), INF),
        (torch.tensor([2.0, INF]), torch.tensor([1.0, INF]), 0.5),
    ],
)
def test_relative_error(expected: object, got: object, error: float) -> None:
    assert relative_error(expected, got) == pytest.approx(error)


class Scored(nn.Module):
    """Returns numbers that are computed from activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        x = torch.relu(self.first(x))
        score = x.std().item()
        x = torch.relu(self.second(x))
        return self.third(x), {"score": score, "norm": x.norm().item(), "half": 0.5}


def test_a_number_computed_from_activations_leaves_no_layer_dense() -> None:
    model = mask_by_hand(randomise(Scored()), 0.3).eval()
    lowered = sx.lower(model, (torch.randn(3, 24),), min_speedup=0)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed"] * 3
    x = torch.randn(3, 24)
    (y, numbers), (expected, wanted) = lowered(x), model(x)
    torch.testing.assert_close(y, expected)
    assert numbers == pytest.approx(wanted, rel=1e-5)


def results(*outputs: object, **buffers: object) -> Results:
    return Results(outputs, buffers)


@pytest.mark.parametrize(
    ("expected", "got", "worst", "wrong"),
    [
        ([results(1.0, 2.0)], [results(1.0, 2.0)], 0.0, None),
        ([results(1.0, 2.0)], [results(1.0, 2.5)], 0.25, "output 1 at batch 1"),
        ([results(1.0, 2.0)], [results(1.0)], INF, "the number of outputs at batch 1"),
        ([results(1.0), results(1.0)], [results(1.0), results(3.0)], 2.0, "output 0 at batch 1 in call 2"),
        ([results(total=4.0)], [results(total=5.0)], 0.25, "the buffer total at batch 1"),
        ([results(total=4.0)], [results()], INF, "the buffer total at batch 1"),
        ([results(4.0, total=4.0)], [results(6.0, total=12.0)], 2.0, "output 0 at batch 1"),
    ],
    ids=[
        *("equal", "another output", "an output less", "another second call", "another buffer", "a buffer less"),
        "the first that is wrong and the worst",
    ],
)
def test_two_models_are_compared_call_by_call(
    expected: list[Results], got: list[Results], worst: float, wrong: str | None
) -> None:
    found = compare([1], lambda _: expected, lambda _, calls: got[:calls])
    assert found.worst == worst
    assert (found.wrong and found.wrong.what + found.wrong.place) == wrong


def test_two_models_are_compared_at_each_batch_size() -> None:
    found = compare([1, 3], lambda size: [results(size)], lambda size, _: [results(min(2, size or 0))])
    assert found.wrong is not None
    assert (found.wrong.size, found.wrong.counts) == (3, (1, 1))
