import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from train_support import batches, mask_copies, mlp, srigl_run, through_a_file, train

import srigl_fx as sx
from srigl_fx.errors import MissingExtraError, TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train.metrics import MaskMetrics


def _polling(metrics: MaskMetrics) -> Callable[[], None]:
    def poll() -> None:
        metrics.poll()

    return poll


class _Table(sx.train.Static):
    """Takes its masks from a table, one row of it a step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, table: list[list[Tensor]]) -> None:
        super().__init__(model, optimizer)
        self.table = table

    def follow(self, step: int) -> None:
        for handle, mask in zip(sparse_weights(self.model), self.table[step - 1], strict=True):
            self._engine.set_mask(handle, mask)
        self.last_update = step


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[entry == "1" for entry in row] for row in rows])


def test_the_numbers_of_a_hand_made_run() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), sparsity=0.5, distribution="uniform")
    first = [_mask("1100", "0110"), _mask("10", "01", "10")]
    second = [_mask("1010", "0110"), _mask("11", "00", "00")]  # one of 4 and two of 3 entries leave, a neuron stays
    trainer = _Table(model, torch.optim.SGD(model.parameters(), lr=0.1), [first, second, first])
    trainer.follow(1)
    metrics = MaskMetrics(trainer)
    assert metrics.layers()["0.weight"] == {
        "sparsity": 0.5,
        "fan_in": 2.0,
        "active_neurons": 2,
        "active_share": 1.0,
        "itop": 0.5,
        "change_rate": 0.0,
    }
    assert not metrics.poll()
    trainer.follow(2)
    assert metrics.poll()
    assert not metrics.poll()
    layers, total = metrics.layers(), metrics.total()
    assert (layers["0.weight"]["itop"], layers["0.weight"]["change_rate"]) == (5 / 8, 1 / 4)
    assert layers["1.weight"] == {
        "sparsity": pytest.approx(4 / 6),
        "fan_in": 2.0,
        "active_neurons": 1,
        "active_share": pytest.approx(1 / 3),
        "itop": pytest.approx(4 / 6),
        "change_rate": pytest.approx(2 / 3),
    }
    expected = {
        "sparsity": 8 / 14,
        "fan_in": 6 / 3,
        "active_neurons": 3,
        "active_share": 3 / 5,
        "itop": 9 / 14,
        "change_rate": 3 / 7,
    }
    assert total == {name: pytest.approx(value) for name, value in expected.items()}
    flat = metrics.flat()
    assert flat["itop/total"] == total["itop"]
    assert flat["itop/1.weight"] == layers["1.weight"]["itop"]
    assert len(metrics.flat(layers=False)) == 6
    assert metrics.postfix() == {"sparsity": "57.1%", "neurons": "60.0%", "itop": "64.3%", "changed": "42.9%"}


def test_itop_is_the_union_of_all_masks() -> None:
    model, optimizer, trainer = srigl_run()
    metrics = MaskMetrics(trainer)
    ever = mask_copies(model)
    updates = 0

    def look() -> None:
        nonlocal updates
        before = {name: mask.clone() for name, mask in ever.items()}
        for name, mask in mask_copies(model).items():
            ever[name] = before[name] | mask
        updates += metrics.poll()

    train(model, optimizer, batches(50), look)
    assert updates == 8
    for name, numbers in metrics.layers().items():
        assert numbers["itop"] == pytest.approx(ever[name].float().mean().item())
        assert numbers["itop"] > 1 - numbers["sparsity"]


def test_an_ordinary_step_reads_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, trainer = srigl_run(update_every=40)
    metrics = MaskMetrics(trainer)
    reads: list[int] = []
    monkeypatch.setattr(Tensor, "cpu", lambda self: reads.append(1))
    monkeypatch.setattr(Tensor, "__int__", lambda self: reads.append(1))
    train(model, optimizer, batches(3), lambda: reads.extend([2] * metrics.poll()))
    assert reads == []


def test_names_are_those_of_the_unwrapped_model() -> None:
    model = mlp()
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)
    trainer = sx.Static(compiled, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(MaskMetrics(trainer).layers()) == [handle.fqn for handle in sparse_weights(model)]


def test_the_union_survives_a_resume() -> None:
    data = list(batches(30))
    model, optimizer, trainer = srigl_run()
    metrics = MaskMetrics(trainer)
    train(model, optimizer, data[:12], _polling(metrics))
    saved = through_a_file(
        [model.state_dict(), optimizer.state_dict(), trainer.state_dict(), metrics.state_dict()],
    )
    other, other_optimizer, other_trainer = srigl_run()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other_trainer.load_state_dict(saved[2])
    resumed = MaskMetrics(other_trainer)
    resumed.load_state_dict(saved[3])
    assert resumed.flat() == metrics.flat()
    assert not resumed.poll()
    train(model, optimizer, data[12:], _polling(metrics))
    train(other, other_optimizer, data[12:], _polling(resumed))
    assert resumed.flat() == metrics.flat()


def test_saving_does_not_hide_an_update() -> None:
    model, optimizer, trainer = srigl_run()
    metrics = MaskMetrics(trainer)
    train(model, optimizer, batches(5))
    assert metrics.state_dict()["step"] == 5
    assert metrics.poll()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model, optimizer, trainer = srigl_run()
    metrics = MaskMetrics(trainer)
    saved = copy.deepcopy(metrics.state_dict())
    train(model, optimizer, batches(6), _polling(metrics))
    before = metrics.flat()
    damaged = copy.deepcopy(metrics.state_dict())
    damaged["layers"]["0.weight"]["ever"] = torch.zeros(3, dtype=torch.uint8)
    foreign = {**metrics.state_dict(), "layers": {}}
    for state, message in (
        (saved, "another mask"),
        (damaged, "0.weight is damaged"),
        (foreign, "another model"),
        ({"version": 0}, "no state"),
        (None, "no state"),
    ):
        with pytest.raises(TrainerError, match=message):
            metrics.load_state_dict(state)  # type: ignore[arg-type]
    assert metrics.flat() == before


@pytest.mark.parametrize(
    ("module", "packages", "extra"),
    [
        ("transformers", ["transformers", "accelerate"], "transformers"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("tensorboard", ["tensorboard"], "tensorboard"),
    ],
)
def test_without_its_extra_an_integration_names_it(
    module: str, packages: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in packages or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"srigl_fx.integrations.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=rf"pip install 'srigl-fx\[{extra}\]'"):
        __import__(f"srigl_fx.integrations.{module}")
