"""What lowering and export take for equal."""

import math

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import TOLERANCE, Limit, Results, compare, limit, relative_error, signal_to_noise

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
    found = compare(["batch 1"], lambda _: expected, lambda _, calls: got[:calls])
    assert found.worst == worst
    assert (found.wrong and found.wrong.what + found.wrong.place) == wrong


def test_two_models_are_compared_at_each_batch_size() -> None:
    found = compare([1, 3], lambda size: [results(size)], lambda size, _: [results(min(2, size or 0))])
    assert found.wrong is not None
    assert (found.wrong.at, found.wrong.counts) == (3, (1, 1))


@pytest.mark.parametrize(
    ("expected", "got", "ratio"),
    [
        (torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5]), 20.0),
        (torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.0]), INF),
        (torch.tensor([3.0, -4.0]), torch.tensor([0.0, 0.0]), 0.0),
        (torch.tensor([3.0, -4.0]), torch.tensor([-3.0, 4.0]), 20 * math.log10(0.5)),
        (torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1e-30]), -INF),
        (torch.tensor([3.0, -4.0]), torch.tensor([3.0, NAN]), -INF),
        (torch.tensor([3.0, NAN, -4.0, INF]), torch.tensor([3.0, NAN, -3.5, INF]), 20.0),
        (torch.tensor([3.0, -4.0]), torch.tensor([[3.0, -4.0]]), -INF),
        (torch.tensor([3 + 4j, 0]), torch.tensor([3 + 3.5j, 0]), 20.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), -INF),
        (torch.full((3,), 1e30), torch.full((3,), 1.1e30), 20.0),
        (torch.full((3,), 1e-40), torch.full((3,), 1.1e-40), 20.0),
        (2.0, 2.2, 20.0),
        (2, 3, -INF),
        ("mean", "mean", INF),
        (None, 1.0, -INF),
    ],
)
def test_signal_to_noise(expected: object, got: object, ratio: float) -> None:
    assert signal_to_noise(expected, got) == pytest.approx(ratio, abs=1e-3)


def test_noise_may_count_in_place_of_errors() -> None:
    allowed = Limit(snr=20.0)
    one, other = results(torch.tensor([30.0, -40.0]), total=4.0), results(torch.tensor([30.0, -35.5]), total=4.0)
    found = compare([1], lambda _: [one], lambda *_: [other], allowed)
    assert found.snr == pytest.approx(20.915, abs=1e-3)
    assert found.worst == 4.5 / 40
    assert found.wrong is None
    found = compare([1], lambda _: [one], lambda *_: [results(torch.tensor([30.0, -34.0]), total=4.0)], allowed)
    assert found.wrong is not None
    assert found.wrong.off(allowed) == "has a signal-to-noise ratio of 18.4 dB"
    found = compare([1], lambda _: [results(1.0, total=4.0)], lambda *_: [results(1.0)], allowed)
    assert found.wrong is not None
    assert (found.wrong.what, found.snr) == ("the buffer total", -INF)
    assert compare([1], lambda _: [one], lambda *_: [other]).snr is None


def test_layers_of_several_dtypes() -> None:
    bfloat16, float16 = (torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16))
    assert limit([]) == limit([torch.float32] * 9) == Limit(TOLERANCE, None)
    assert limit([torch.bfloat16] * 3 + [torch.float32]).error == bfloat16 * math.sqrt(3)
    mixed = limit([torch.bfloat16, torch.float16, torch.bfloat16])
    assert mixed.error == pytest.approx(math.sqrt(2 * bfloat16**2 + float16**2))
    assert limit([torch.int8, torch.float32]).snr == limit([torch.int8] * 5).snr == 20.0
