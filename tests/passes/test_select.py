"""The rule that picks a layer's form, on made-up times."""

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture_whole
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Costs, Decision, Program, Times
from srigl_fx.passes.select import Select, decide

FAST: Times = {1: {"dense": 4.0, "condensed": 1.0}}
SLOW: Times = {1: {"dense": 1.0, "condensed": 4.0}}
MIXED: Times = {1: {"dense": 4.0, "condensed": 1.0}, 64: {"dense": 4.0, "condensed": 8.0}}
ABLATED: Times = {1: {"dense": 4.0, "condensed": 5.0, "shrunk": 2.0}}
BOTH: Times = {1: {"dense": 6.0, "condensed": 2.0, "shrunk": 3.0}, 8: {"dense": 6.0, "condensed": 4.0, "shrunk": 3.0}}


@pytest.mark.parametrize(
    ("times", "min_speedup", "decision", "reason"),
    [
        (FAST, 1.0, "condensed", "4.00 times as fast as dense at batch 1"),
        (FAST, 4.0, "condensed", "4.00 times as fast as dense at batch 1"),
        (FAST, 4.1, "dense", "condensed is 4.00 times as fast as dense at batch 1"),
        (MIXED, 1.0, "dense", "condensed is 0.50 times as fast as dense at batch 64"),
        (MIXED, 0.5, "condensed", "0.50 times as fast as dense at batch 64"),
        (ABLATED, 1.0, "shrunk", "2.00 times as fast as dense at batch 1"),
        (
            ABLATED,
            3.0,
            "dense",
            "condensed is 0.80 times as fast as dense at batch 1; shrunk is 2.00 times as fast as dense at batch 1",
        ),
        (BOTH, 1.0, "shrunk", "2.00 times as fast as dense at batch 1"),
    ],
)
def test_decide(times: Times, min_speedup: float, decision: str, reason: str) -> None:
    assert decide(times, min_speedup) == (decision, reason)


@pytest.mark.parametrize(
    ("condensed", "shrunk", "decision"),
    [(1.04, 1.0, "condensed"), (1.06, 1.0, "shrunk"), (1.0, 1.04, "condensed"), (1.0, 1.06, "condensed")],
)
def test_within_noise_fewer_bytes_win(condensed: float, shrunk: float, decision: str) -> None:
    times: Times = {1: {"dense": 4.0, "condensed": condensed, "shrunk": shrunk}}
    assert decide(times, 1.0, {"condensed": 6, "shrunk": 40})[0] == decision


def test_no_allowance_against_dense() -> None:
    times: Times = {1: {"dense": 1.0, "condensed": 1.01}}
    assert decide(times, 1.0, {"condensed": 6})[0] == "dense"
    nearly: Times = {1: {"dense": 1.0, "condensed": 1.01, "shrunk": 1.0}}
    assert decide(nearly, 1.0, {"condensed": 6, "shrunk": 40})[0] == "shrunk"


@pytest.fixture
def program() -> Program:
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    mask_by_hand(randomise(model), 0.3, ablated={"2.weight": 3}).eval()
    captured = capture_whole(model, (torch.randn(2, 20),), {}).program
    assert captured is not None
    return run((*LOWERING, MatchWeights()), captured).subject


def decisions(program: Program) -> dict[str, tuple[Decision, str]]:
    return {layer.weight.fqn: (layer.decision, layer.reason) for layer in program.layers}


@pytest.mark.slow
def test_times_go_before_estimates_and_estimates_say_so(program: Program) -> None:
    costs = Costs(measured={"0.weight": FAST}, estimated={"0.weight": SLOW, "2.weight": SLOW, "4.weight": FAST})
    select = Select(lambda _: costs, 1.0)
    selected = run((select,), program).subject
    assert decisions(selected) == {
        "0.weight": ("condensed", "4.00 times as fast as dense at batch 1"),
        "2.weight": ("dense", "estimated: condensed is 0.25 times as fast as dense at batch 1"),
        "4.weight": ("condensed", "estimated: 4.00 times as fast as dense at batch 1"),
    }
    assert [layer.times for layer in selected.layers] == [FAST, {}, {}]
    assert [layer.estimates for layer in selected.layers] == [SLOW, SLOW, FAST]


@pytest.mark.slow
def test_estimates_do_not_count_where_no_speedup_is_asked_for(program: Program) -> None:
    estimates = dict.fromkeys(("0.weight", "2.weight", "4.weight"), SLOW)
    selected = run((Select(lambda _: Costs(estimated=estimates)),), program).subject
    assert set(decisions(selected).values()) == {("condensed", "")}
    assert all(layer.estimates == SLOW for layer in selected.layers)
