import copy
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SRigL

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("accelerate", reason="the extra [transformers] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")

from srigl_fx.integrations.transformers import MASKS_FILE, STATE_FILE, SRigLCallback  # noqa: E402 - only where it is installed

OPTIONS: dict[str, Any] = {"update_every": 4, "ablation": 0.5, "drop_fraction": 0.5}


class Recorder(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
    """What the Trainer's reporters get to see, and checks after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        sx.verify(model, optimizer.optimizer)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.seen.append(dict(logs))


def _bert(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
        **options,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def _gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _sentences(count: int = 64, *, causal: bool = False) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row if causal else row[0] % 3} for row in ids]


def _trainer(model: nn.Module, folder: Path, callback: Any, **arguments: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    data = values.pop("data", None) or arguments.pop("data", None) or _sentences()
    evaluation = arguments.pop("evaluation", None)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**values, **arguments}),
        train_dataset=data,
        eval_dataset=evaluation,
        callbacks=[callback, Recorder()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _assert_same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.long
def test_a_run_updates_logs_and_detaches(tmp_path: Path) -> None:
    model = sx.sparsify(_bert(), sparsity=0.8)
    start = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
    callback = SRigLCallback(log_layers=True, **OPTIONS)
    trainer = _trainer(model, tmp_path, callback)
    trainer.train()
    assert isinstance(callback.sparse_trainer, SRigL)
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.last_update) == (20, 12)
    assert callback.sparse_trainer.end == 15
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "srigl/itop/total" in entry}
    assert list(entries) == [4, 8, 12]
    assert callback.metrics is not None
    assert entries[12].items() >= {f"srigl/{name}": value for name, value in callback.metrics.flat().items()}.items()
    assert entries[12]["srigl/itop/total"] > entries[4]["srigl/itop/total"] > 0
    assert any(not torch.equal(start[handle.fqn], handle.mask) for handle in sparse_weights(model))
    sx.verify(model)
    # Nothing is attached any more: another method can be.
    sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1)).detach()


@pytest.mark.long
def test_reporters_see_the_numbers_once_the_callback_comes_first(tmp_path: Path) -> None:
    callback, reporter = SRigLCallback(log_updates=False, **OPTIONS), Recorder()
    model = sx.sparsify(_bert(), sparsity=0.8)
    trainer = _trainer(model, tmp_path, reporter, logging_strategy="steps", logging_steps=10)
    assert callback.add_to(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    assert [sorted(entry)[-3:] for entry in reporter.seen if "srigl/sparsity/total" in entry] == [
        ["srigl/fan_in/total", "srigl/itop/total", "srigl/sparsity/total"]
    ] * 2


@pytest.mark.long
@pytest.mark.parametrize("cut", [6, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "causal", "method"),
    [(_bert, False, {}), (_gpt2, True, {}), (_bert, False, {"method": SET}), (_bert, False, {"method": GMP})],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, cut: int, make: Any, causal: bool, method: dict[str, Any]
) -> None:
    options = {"update_every": 4, "drop_fraction": 0.5, "grad_samples": 1 if method else 3, **method}

    def trainer(callback: SRigLCallback, seed: int) -> Any:
        return _trainer(
            sx.sparsify(make(seed), sparsity=0.8),
            tmp_path,
            callback,
            data=_sentences(causal=causal),
            save_strategy="steps",
            save_steps=cut,
            max_grad_norm=0.5,
            gradient_accumulation_steps=2,
        )

    whole = SRigLCallback(**options)
    first = trainer(whole, 0)
    first.train()
    resumed = SRigLCallback(**options)
    second = trainer(resumed, 1)
    checkpoint = tmp_path / f"checkpoint-{cut}"
    second.train(resume_from_checkpoint=str(checkpoint))
    _assert_same(first.model, second.model)
    assert whole.metrics is not None
    assert resumed.metrics is not None
    assert resumed.metrics.flat() == whole.metrics.flat()
    assert resumed.metrics.total()["change_rate"] > 0
    assert {path.name for path in checkpoint.iterdir() if "srigl" in path.name} == {STATE_FILE, MASKS_FILE}


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"bf16": True},
        pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 3},
    ],
)
def test_masks_hold_at_every_step(tmp_path: Path, precision: dict[str, Any]) -> None:
    callback = SRigLCallback(**OPTIONS)
    trainer = _trainer(sx.sparsify(_bert(), sparsity=0.8), tmp_path, callback, max_grad_norm=0.1, **precision)
    trainer.train()  # the recorder verifies each step
    assert callback.sparse_trainer is not None
    assert (callback.sparse_trainer.steps, callback.sparse_trainer.last_update) == (20, 12)


@pytest.mark.long
def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    callback = SRigLCallback(**OPTIONS)
    trainer = _trainer(sx.sparsify(_bert(), sparsity=0.8), tmp_path, callback)
    trainer.train()
    first = callback.sparse_trainer
    trainer.train()
    assert callback.sparse_trainer is not None
    assert callback.sparse_trainer is not first
    assert callback.sparse_trainer.steps == 20


@pytest.mark.long
def test_an_interrupted_training_can_be_started_again(tmp_path: Path) -> None:
    class Interrupt(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        armed = True

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt

    callback, interrupt = SRigLCallback(detach_at_end=False, **OPTIONS), Interrupt()
    trainer = _trainer(sx.sparsify(_bert(), sparsity=0.8), tmp_path, callback)
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    interrupt.armed = False
    trainer.train()
    assert callback.sparse_trainer is not None
    assert callback.sparse_trainer.steps == 20


@pytest.mark.long
def test_the_best_model_keeps_its_masks(tmp_path: Path) -> None:
    callback = SRigLCallback(**OPTIONS)
    trainer = _trainer(
        sx.sparsify(_gpt2(), sparsity=0.8),
        tmp_path,
        callback,
        data=_sentences(causal=True),
        evaluation=_sentences(8, causal=True),
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        greater_is_better=True,  # of the loss: the first checkpoint is the best
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    other = sx.sparsify(_gpt2(1), sparsity=0.8)
    from safetensors.torch import load_file

    missing, unexpected = other.load_state_dict(load_file(tmp_path / "checkpoint-5" / "model.safetensors"), False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    _assert_same(trainer.model, other)
    sx.verify(trainer.model)


@pytest.mark.long
@pytest.mark.parametrize("best", [True, False])
def test_a_model_that_ends_over_its_budget_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, best: bool
) -> None:
    trainer = _trainer(
        sx.sparsify(_gpt2(), sparsity=0.8, mask_init="dense"),
        tmp_path,
        SRigLCallback(GMP, update_every=4),
        data=_sentences(causal=True),
        evaluation=_sentences(8, causal=True),
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=best,
        greater_is_better=True,  # of the loss: the first checkpoint is the best
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "not as sparse as asked" in record.getMessage()]
    assert len(warnings) == best
    assert all("masks keep more than their budget, first that of transformer.h.0" in text for text in warnings)


def test_options_that_the_method_does_not_know_are_refused_at_once() -> None:
    with pytest.raises(TrainerError, match=r"SRigL cannot be called .*'update_evry'.*SRigL\(model, .*update_every"):
        SRigLCallback(update_evry=3)
    with pytest.raises(TrainerError, match=r"SET cannot be called .*'ablation'"):
        SRigLCallback(SET, ablation=0.5)
    with pytest.raises(TrainerError, match="'model'"):
        SRigLCallback(model=nn.Linear(2, 2))
    SRigLCallback(partial(SET, seed=3), update_every=4)
    SRigLCallback(lambda model, optimizer, **options: SET(model, optimizer, **options), anything=4)


@pytest.mark.long
def test_a_checkpoint_elsewhere_is_named(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 10}
    first = _trainer(sx.sparsify(_bert(), sparsity=0.8), tmp_path / "first", SRigLCallback(**OPTIONS), **arguments)
    first.train()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "first" / "checkpoint-10", moved)
    shutil.copytree(tmp_path / "first" / "checkpoint-20", tmp_path / "second" / "checkpoint-10")

    def resume(callback: SRigLCallback, folder: str = "second") -> nn.Module:
        model = sx.sparsify(_bert(), sparsity=0.8)
        _trainer(model, tmp_path / folder, callback, **arguments).train(resume_from_checkpoint=str(moved))
        return model

    with pytest.raises(TrainerError, match=r"is of step 20, .* resumes at step 10.*resume_from"):
        resume(SRigLCallback(**OPTIONS))
    with pytest.raises(TrainerError, match=r"holds no srigl_fx\.safetensors.*resume_from"):
        resume(SRigLCallback(**OPTIONS), "third")
    _assert_same(resume(SRigLCallback(resume_from=moved, **OPTIONS)), first.model)
    whole = (moved / STATE_FILE).read_bytes()
    (moved / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        resume(SRigLCallback(resume_from=moved, **OPTIONS))


@pytest.mark.long
def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 10}
    for name, seed in (("a", 0), ("b", 1)):
        model = sx.sparsify(_bert(seed), sparsity=0.8)
        _trainer(model, tmp_path / name, SRigLCallback(**OPTIONS), **arguments).train()
    model = sx.sparsify(_bert(), sparsity=0.8)
    trainer = _trainer(model, tmp_path / "b", SRigLCallback(**OPTIONS), **arguments)
    with pytest.raises(TrainerError, match="has another mask"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1))  # nothing was attached


def test_a_model_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="BertForSequenceClassification has no mask-managed weight"):
        _trainer(_bert(), tmp_path, SRigLCallback(**OPTIONS)).train()


@pytest.mark.long
def test_a_copy_is_attached_to_nothing(tmp_path: Path) -> None:
    callback = SRigLCallback(detach_at_end=False, **OPTIONS)
    model = sx.sparsify(_bert(), sparsity=0.8)
    _trainer(model, tmp_path, callback).train()
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.sparse_trainer, twin.metrics, twin.options) == (None, None, OPTIONS)
    assert callback.sparse_trainer is not None
    sx.verify(copy.deepcopy(model))


@pytest.mark.long
def test_a_teacher_in_the_place_of_labels(tmp_path: Path) -> None:
    teacher = _bert(seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = sx.sparsify(copy.deepcopy(teacher), sparsity=0.9, distribution="uniform")
    ids = torch.randint(40, (32, 8), generator=torch.Generator().manual_seed(0))
    measure = sx.DistillationLoss(teacher, states=["bert.encoder.layer.0"])

    class Distilling(transformers.Trainer):  # type: ignore[name-defined, misc]
        loss_is_scaled_for_ga = False

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **rest: Any
        ) -> Any:
            inputs.pop("labels")
            loss = measure(model, **inputs)
            return (loss, {}) if return_outputs else loss

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=5e-4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    arguments.dataloader_pin_memory = False
    data = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    with torch.no_grad():
        before = float(measure(model.eval(), input_ids=ids))
    callbacks = [SRigLCallback(sx.Static), Recorder()]
    Distilling(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks).train()
    with torch.no_grad():
        assert float(measure(model.eval(), input_ids=ids)) < 0.9 * before
    assert sparse_weights(model)
