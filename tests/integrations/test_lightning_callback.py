import copy
import csv
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import srigl_fx as sx
from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SRigL

lightning = pytest.importorskip("lightning.pytorch", reason="the extra [lightning] is not installed")
from lightning.pytorch import Callback, LightningModule  # noqa: E402 - only where it is installed
from lightning.pytorch import Trainer as LightningTrainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger  # noqa: E402

from srigl_fx.integrations.lightning import SRigLCallback  # noqa: E402

OPTIONS: dict[str, Any] = {"update_every": 4, "ablation": 0.5, "drop_fraction": 0.5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]


class Digits(LightningModule):
    """A small classifier of random inputs whose classes can be learned."""

    def __init__(self, seed: int = 0, *, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        if sparse:
            sx.sparsify(self.net, sparsity=0.75)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(80, 24, generator=generator)
        return DataLoader(TensorDataset(x, (x @ torch.randn(24, 4, generator=generator)).argmax(1)), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Watch(Callback):
    """Verifies model and optimizer after each batch."""

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        sx.verify(pl_module, trainer.optimizers[0])


def _trainer(folder: Path, *callbacks: Any, epochs: int = 2, logger: Logger | bool = False, **more: Any) -> Any:
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "logger": logger,
        "use_distributed_sampler": False,
    }
    return LightningTrainer(callbacks=[*callbacks, Watch()], **{**values, **more})


def _assert_same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_updates_logs_and_detaches(tmp_path: Path) -> None:
    model, callback = Digits(), SRigLCallback(prog_bar=True, **OPTIONS)
    start = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
    logger = CSVLogger(tmp_path)
    trainer = _trainer(tmp_path, callback, logger=logger)
    trainer.fit(model)
    assert isinstance(callback.sparse_trainer, SRigL)
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.end) == (20, 15)
    assert any(not torch.equal(start[handle.fqn], handle.mask) for handle in sparse_weights(model))
    with open(logger.experiment.metrics_file_path, encoding="utf-8") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["srigl/itop/total"]}
    assert list(rows) == [4, 8, 12]
    assert callback.metrics is not None
    assert "srigl/change_rate/net.0.weight" in rows[12]
    for name, value in callback.metrics.flat().items():
        assert float(rows[12][f"srigl/{name}"]) == value
    assert trainer.callback_metrics["srigl/itop"] == pytest.approx(callback.metrics.total()["itop"])
    sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"method": SET}, {"grad_samples": 3}, {"method": GMP}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, more: dict[str, Any]) -> None:
    options = {"update_every": 4, "drop_fraction": 0.5, **more}
    whole, model = SRigLCallback(**options), Digits(0)
    arguments: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "epochs": 4}

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1)

    _trainer(tmp_path, whole, keep(), **arguments).fit(model)
    resumed, other = SRigLCallback(**options), Digits(1)
    (checkpoint,) = tmp_path.glob("*step=10.ckpt")
    _trainer(tmp_path, resumed, keep(), **arguments).fit(other, ckpt_path=checkpoint)
    _assert_same(model, other)
    assert whole.metrics is not None
    assert resumed.metrics is not None
    assert resumed.metrics.flat() == whole.metrics.flat()
    assert resumed.metrics.step == 12
    assert resumed.metrics.total()["change_rate"] > 0


@pytest.mark.parametrize("auto", [True, False])
def test_a_model_that_ends_over_its_budget_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, auto: bool
) -> None:
    _trainer(tmp_path, SRigLCallback(GMP, update_every=4, auto=auto)).fit(Digits())  # nobody calls step()
    assert caplog.text.count("3 of 3 masks keep more than their budget, first that of net.0.weight") == (not auto)


def test_options_that_the_method_does_not_know_are_refused_at_once() -> None:
    with pytest.raises(TrainerError, match=r"SRigL cannot be called .*'update_evry'"):
        SRigLCallback(update_evry=3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_the_snippet_of_the_documentation_runs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (checkout / "docs" / "integrations.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(snippet, "integrations.md", "exec"), names)
    assert names["callback"].metrics.step == 10
    assert names["resumed"].metrics.step == 35


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "epochs": 4},
        {"gradient_clip_val": 0.01},
    ],
)
def test_masks_hold_at_every_step(tmp_path: Path, more: dict[str, Any]) -> None:
    callback = SRigLCallback(**OPTIONS)
    _trainer(tmp_path, callback, **more).fit(Digits())  # the watch verifies each batch
    assert callback.sparse_trainer is not None
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.last_update) == (20, 12)


def test_clipping_sees_masked_gradients(tmp_path: Path) -> None:
    class Clipping(Callback):
        seen = 0

        def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
            for handle in sparse_weights(pl_module):
                assert handle.weight.grad is not None
                assert not handle.weight.grad[~handle.mask].any()
                assert handle.weight.grad[handle.mask].any()
                self.seen += 1

    clipping = Clipping()
    _trainer(tmp_path, SRigLCallback(**OPTIONS), clipping, gradient_clip_val=0.1).fit(Digits())
    assert clipping.seen == 20 * len(sparse_weights(Digits()))


@pytest.mark.slow
def test_a_further_fit_goes_on_and_a_new_trainer_starts_anew(tmp_path: Path) -> None:
    callback, model = SRigLCallback(total_steps=40, **OPTIONS), Digits()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    assert callback.sparse_trainer is not None
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.last_update) == (30, 28)
    _trainer(tmp_path, callback).fit(model)
    assert callback.sparse_trainer.steps == 20


def test_two_parts_with_an_optimizer_each(tmp_path: Path) -> None:
    class Pair(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = sx.sparsify(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.5)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.net, self.other)]

    first = SRigLCallback(module="net", **OPTIONS)
    second = SRigLCallback(SET, module="other", update_every=5)
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = _trainer(tmp_path, first, second, keep)
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Watch)]
    model = Pair()
    trainer.fit(model)
    sx.verify(model)
    assert first.metrics is not None
    assert second.metrics is not None
    assert (first.metrics.step, second.metrics.step) == (12, 10)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert saved[first.state_key]["trainer"]["method"] == "SRigL"
    assert saved[second.state_key]["trainer"]["method"] == "SET"
    assert sx.Recipe.from_dict(saved[first.state_key]["recipes"][""]) == sx.recipe(model.net)


def test_copies_carry_masks_and_no_trainer(tmp_path: Path) -> None:
    class Copy(Callback):
        twin: LightningModule | None = None

        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                self.twin = copy.deepcopy(pl_module)
                state = {name: value.clone() for name, value in self.twin.state_dict().items()}
                optimizer = torch.optim.SGD(self.twin.parameters(), lr=0.1)
                sx.Static(self.twin, optimizer)  # a copy has no trainer
                assert all(torch.equal(value, state[name]) for name, value in self.twin.state_dict().items())

    taken, callback = Copy(), SRigLCallback(**OPTIONS)
    _trainer(tmp_path, callback, taken).fit(Digits())
    assert taken.twin is not None
    sx.verify(taken.twin)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.sparse_trainer, twin.metrics, twin.options) == (None, None, OPTIONS)


def test_an_average_of_the_weights_is_masked_by_apply(tmp_path: Path) -> None:
    class Average(WeightAveraging):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            super().on_train_end(trainer, pl_module)
            sx.masks.apply(pl_module)

    model, callback = Digits(), SRigLCallback(**OPTIONS)
    trainer = _trainer(tmp_path, callback, Average(use_buffers=False))
    trainer.fit(model)
    sx.verify(model)
    assert callback.sparse_trainer is not None
    assert callback.sparse_trainer.last_update == 12


def test_what_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="Digits has no mask-managed weight"):
        _trainer(tmp_path, SRigLCallback(**OPTIONS)).fit(Digits(sparse=False))
    with pytest.raises(TrainerError, match="Digits has no part 'nett'"):
        _trainer(tmp_path, SRigLCallback(module="nett", **OPTIONS)).fit(Digits())

    class Endless(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    with pytest.raises(TrainerError, match=r"needs their number.*total_steps="):
        _trainer(tmp_path, SRigLCallback(**OPTIONS), Endless(), epochs=-1).fit(Digits())
    _trainer(tmp_path, SRigLCallback(total_steps=100, **OPTIONS), Endless(), epochs=-1).fit(Digits())

    class Wrong(Digits):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)

    with pytest.raises(TrainerError, match=r"the optimizer does not hold net\.0\.weight"):
        _trainer(tmp_path, SRigLCallback(**OPTIONS)).fit(Wrong())


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = _trainer(tmp_path, SRigLCallback(**OPTIONS), keep, epochs=1)
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Watch)]
    trainer.fit(Digits())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    saved["callbacks"] = {name: state for name, state in saved["callbacks"].items() if "SRigL" not in name}
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(TrainerError, match="holds no state of this callback"):
        _trainer(tmp_path, SRigLCallback(**OPTIONS), ModelCheckpoint(dirpath=tmp_path)).fit(
            Digits(), ckpt_path=tmp_path / "last.ckpt"
        )


@pytest.mark.slow
def test_the_other_namespace(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Plain(other.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Digits().net

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=5e-3)

    callback = SRigLCallback(**OPTIONS)
    trainer = other.Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(), Digits().train_dataloader())
    assert callback.sparse_trainer is not None
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.last_update) == (20, 12)
