import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import CheckpointError
from srigl_fx.recipes import recipes_of
from srigl_fx.train import GMP, checkpoint_file

pytest.importorskip("accelerate", reason="the extra [transformers] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")

from srigl_fx.integrations.transformers import (  # noqa: E402 - only where it is installed
    MASKS_FILE,
    SRigLCallback,
    from_pretrained,
    save_pretrained,
)


def _gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_hidden_layers=1))


def _t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    return transformers.T5ForConditionalGeneration(config)


def _mixtral() -> Any:
    """Its experts are one tensor in memory and one for each expert in a file."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    more = {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more))


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "gpt2": (_gpt2, transformers.AutoModelForCausalLM),
    "bert": (_bert, transformers.AutoModelForSequenceClassification),
    "t5": (_t5, transformers.T5ForConditionalGeneration),
    "mixtral": (_mixtral, transformers.AutoModelForCausalLM),
}


def _inputs(model: Any, rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (rows, 8), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _same(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def _train(model: Any, steps: int = 12) -> None:
    """SRigL with ablation, so that neither masks nor neurons are those of the first day."""
    model.eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    trainer = sx.SRigL(model, optimizer, total_steps=steps, update_every=3, ablation=0.5, drop_fraction=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**_inputs(model)).logits.square().mean().backward()
        optimizer.step()
    trainer.detach()


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_survives(name: str, tmp_path: Path) -> None:
    make, auto = MODELS[name]
    model = sx.sparsify(make(), sparsity=0.8)
    first = {name: mask.clone() for name, mask in sx.masks.named_masks(model)}
    _train(model)
    assert any(not torch.equal(first[name], mask) for name, mask in sx.masks.named_masks(model))
    save_pretrained(model, tmp_path)
    again = from_pretrained(auto, tmp_path)
    _same(model, again)
    sx.verify(again)
    assert sx.recipe(again) == sx.recipe(model)
    assert torch.equal(model(**_inputs(model)).logits, again(**_inputs(model)).logits)
    _train(model)
    _train(again)
    _same(model, again)
    assert [(row.name, row.status, row.reason) for row in sx.summary(again).rows] == [
        (row.name, row.status, row.reason) for row in sx.summary(model).rows
    ]


@pytest.mark.slow
def test_the_plain_call_loads_a_dense_model_and_says_nothing_of_masks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8).eval()
    save_pretrained(model, tmp_path)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "mask" not in caplog.text
    assert list(sx.masks.named_masks(dense)) == []
    assert torch.equal(model(**_inputs(model)).logits, dense(**_inputs(model)).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.slow
def test_shards_and_tied_weights(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    _same(model, again)
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.slow
def test_a_part_of_the_model_and_two_parts(tmp_path: Path) -> None:
    model = _bert()
    sx.sparsify(model.bert.encoder, sparsity=0.8)
    save_pretrained(model, tmp_path / "one")
    _same(model, from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "one"))
    sx.sparsify(model.bert.pooler, sparsity=0.5)
    save_pretrained(model, tmp_path / "two")
    again = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "two")
    _same(model, again)
    assert sx.recipe(again.bert.pooler) == sx.recipe(model.bert.pooler)


def _of_more_words() -> Any:
    model = sx.sparsify(_bert(), sparsity=0.8)
    model.resize_token_embeddings(56)
    return model


def _with_a_new_head(sparsity: float | None) -> Any:
    model = sx.sparsify(_bert(), sparsity=0.8)
    head = nn.Linear(32, 5)
    model.classifier, model.config.num_labels, model.num_labels = head, 5, 5
    if sparsity is not None:
        sx.sparsify(head, sparsity=sparsity)
    return model


def _with_parts_inside_a_part() -> Any:
    model = _bert()
    sx.sparsify(model.bert.encoder, sparsity=0.8)
    model.bert.encoder.layer[0].output.dense = nn.Linear(64, 32)
    sx.sparsify(model.bert.encoder.layer[0].output, sparsity=0.5)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [_of_more_words, lambda: _with_a_new_head(None), lambda: _with_a_new_head(0.5), _with_parts_inside_a_part],
    ids=["more words", "a new dense head", "a new sparse head", "a part inside a part"],
)
def test_a_model_that_was_changed_after_it_was_made_sparse_survives(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    save_pretrained(model, tmp_path)
    again = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path)
    _same(model, again)
    assert recipes_of(again) == recipes_of(model)
    sx.verify(again)


@pytest.mark.long
def test_a_folder_of_the_plain_call_may_be_in_another(tmp_path: Path) -> None:
    model = sx.sparsify(_bert(), sparsity=0.8)
    model.save_pretrained(tmp_path / "inner")
    where: dict[str, Any] = {"subfolder": "inner", "local_files_only": True, "recipe": sx.recipe(model)}
    _same(model, from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path, **where))


@pytest.mark.slow
def test_another_class_than_was_saved_is_told_so(tmp_path: Path) -> None:
    save_pretrained(sx.sparsify(_bert(), sparsity=0.8), tmp_path)
    with pytest.raises(CheckpointError, match=r"not of the BertModel that .* Load the class that was saved"):
        from_pretrained(transformers.AutoModel, tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile
def test_a_compiled_model_is_saved_as_the_model_inside(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    save_pretrained(torch.compile(model), tmp_path)  # type: ignore[arg-type]
    _same(model, from_pretrained(transformers.AutoModelForCausalLM, tmp_path))


@pytest.mark.long
def test_another_dtype_has_the_same_masks(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    save_pretrained(model, tmp_path)
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    assert again.dtype is torch.bfloat16
    for (_, one), (_, other) in zip(sx.masks.named_masks(model), sx.masks.named_masks(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.long
def test_a_model_that_is_being_pruned(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8, mask_init="dense")
    save_pretrained(model, tmp_path)
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    _same(model, again)
    GMP(again, torch.optim.SGD(again.parameters(), lr=0.1), total_steps=100).detach()


@pytest.mark.long
def test_a_finished_model_can_be_lowered(tmp_path: Path) -> None:
    model = sx.sparsify(_bert(), sparsity=0.8)
    save_pretrained(model, tmp_path)
    again = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path)
    lowered = sx.lower(again, ((), _inputs(model)), min_speedup=0)
    assert lowered.recipe == sx.recipe(model)


def _trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **arguments,
    }
    ids = torch.randint(1, 40, (64, 8), generator=torch.Generator().manual_seed(7))
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**values),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[SRigLCallback(update_every=3, drop_fraction=0.5)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.mark.long
def test_checkpoints_of_the_trainer_and_its_best_model(tmp_path: Path) -> None:
    trainer = _trainer(
        sx.sparsify(_gpt2(), sparsity=0.8),
        tmp_path,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        greater_is_better=True,  # of the loss: the first checkpoint is the best
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "checkpoint-4")
    _same(trainer.model, again)
    last = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "checkpoint-12")
    assert any(
        not torch.equal(one, other)
        for (_, one), (_, other) in zip(sx.masks.named_masks(last), sx.masks.named_masks(again), strict=True)
    )
    resumed = _trainer(again, tmp_path / "more", max_steps=8, save_strategy="no")
    resumed.train()
    sx.verify(again)


@pytest.mark.long
def test_a_folder_of_the_plain_call_needs_the_recipe(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    _train(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=f"no {MASKS_FILE} with the recipe.*Pass recipe="):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path, recipe=sx.recipe(model))
    _same(model, again)


@pytest.mark.long
def test_the_recipe_of_another_model_is_refused_as_such(tmp_path: Path) -> None:
    sx.sparsify(_bert(), sparsity=0.8).save_pretrained(tmp_path)
    others: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 0.85}, "the masks there keep other numbers of weights than it decided"),
        ({"sparsity": 0.95}, r".*'classifier\.weight' has no mask"),
    ]
    for arguments, differs in others:
        recipe = sx.recipe(sx.sparsify(_bert(), **arguments))
        message = rf"^the recipe is not that of the model that was saved in {tmp_path}: {differs}\. Pass recipe=\S+ of "
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path, recipe=recipe)


def test_a_folder_that_is_not_there_and_a_class_that_loads_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^there is no folder {tmp_path / 'none'}, and no model of that name"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"^Linear has no from_pretrained: give the model's class"):
        from_pretrained(nn.Linear, tmp_path)


def test_a_dense_folder_and_a_dense_model_are_refused(tmp_path: Path) -> None:
    model = _gpt2()
    with pytest.raises(CheckpointError, match="has no masks"):
        save_pretrained(model, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds no {MASKS_FILE}, and no masks"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cut", "empty", "other", "newer", "no recipe", "newer recipe", "a mask less"])
def test_damaged_masks_are_refused(what: str, tmp_path: Path) -> None:
    save_pretrained(sx.sparsify(_gpt2(), sparsity=0.8), tmp_path)
    path = tmp_path / MASKS_FILE
    contents = checkpoint_file.read(path)
    edits: dict[str, tuple[Callable[[], object], str]] = {
        "cut": (lambda: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        "empty": (lambda: path.write_bytes(b""), "damaged"),
        "other": (lambda: checkpoint_file.write(path, {"step": 3}), "no masks of a model"),
        "newer": (lambda: checkpoint_file.write(path, {**contents, "version": 2}), "version 2, .*update it"),
        "no recipe": (lambda: checkpoint_file.write(path, {**contents, "recipes": {}}), "holds no recipe"),
        "newer recipe": (
            lambda: checkpoint_file.write(
                path, {**contents, "recipes": {"": {**contents["recipes"][""], "version": 9}}}
            ),
            "version 9, .*update it",
        ),
        "a mask less": (
            lambda: checkpoint_file.write(path, {**contents, "masks": dict([*contents["masks"].items()][1:])}),
            "'transformer.h.0.attn.c_attn.weight' has no mask",
        ),
    }
    edit, words = edits[what]
    edit()
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


@pytest.mark.long
def test_masks_of_another_save_are_refused(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    save_pretrained(model, tmp_path / "a")
    _train(model)
    save_pretrained(model, tmp_path / "b")
    shutil.copy(tmp_path / "a" / MASKS_FILE, tmp_path / "b" / MASKS_FILE)
    with pytest.raises(CheckpointError, match=r"c_attn\.weight' is not zero at \d+ places off its mask"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "b")


def test_a_save_that_fails_leaves_no_masks_beside_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    save_pretrained(model, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, tmp_path)
    assert not (tmp_path / MASKS_FILE).exists()


def test_options_that_would_lose_the_masks_are_refused(tmp_path: Path) -> None:
    model = sx.sparsify(_gpt2(), sparsity=0.8)
    with pytest.raises(CheckpointError, match="push_to_hub"):
        save_pretrained(model, tmp_path, push_to_hub=True)
    with pytest.raises(CheckpointError, match="no save_pretrained"):
        save_pretrained(sx.sparsify(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5), tmp_path)
    save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match="holds the recipe already"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path, recipe=sx.recipe(model))
    with pytest.raises(CheckpointError, match="output_loading_info"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path, output_loading_info=True)


@pytest.mark.slow
def test_weights_in_the_file_are_those_of_the_model_without_masks(tmp_path: Path) -> None:
    model = sx.sparsify(_bert(), sparsity=0.8)
    expected = sx.finalize(copy.deepcopy(model)).state_dict()
    save_pretrained(model, tmp_path)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)


@pytest.mark.parametrize("path", ["notes.txt", "notes.txt/model"])
def test_a_file_in_place_of_the_folder_is_refused_and_left_as_it_is(path: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = sx.sparsify(_bert(), sparsity=0.8)
    with pytest.raises(CheckpointError, match=r"notes\.txt.* cannot be written .*: give a folder"):
        save_pretrained(model, tmp_path / path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
