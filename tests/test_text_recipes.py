"""The recipes of texts: what they say, what they read, and that a run goes on after a stop."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import train_recipe
from recipes import bert_mnli, bert_sst2, gpt_text
from recipes.data import Reader
from recipes.loop import Options, Task, train
from recipes.text import Language, Sentences, Windows, read_text

import srigl_fx as sx


def tiny_bert(smoke: bool = True, *, seed: int | None = None) -> nn.Module:
    """Another seed than that of the run gives other weights."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 1, "num_labels": 3}
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        model: nn.Module = BertForSequenceClassification(
            BertConfig(**sizes, num_attention_heads=2, intermediate_size=64)
        )
    return model


def tiny_gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, use_cache=False, bos_token_id=None, eos_token_id=None)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def tiny(kind: str, folder: Path) -> Task:
    """A small network under the settings of a recipe, everything switched on."""
    if kind == "gpt":
        language = replace(gpt_text.X1.smoke(), build=tiny_gpt, epochs=3, sparsity=0.5, micro_batches=2)
        return Language(language, None)
    sentences = replace(bert_mnli.X1.smoke(), build=tiny_bert, epochs=3, sparsity=0.5, batch=4, micro_batches=2)
    if kind == "bert by SRigL":
        return Sentences(replace(sentences, method="srigl"), None)
    if not folder.exists():
        tiny_bert(seed=7).save_pretrained(folder)  # type: ignore[operator]
    return Sentences(sentences, None, teacher=str(folder))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt", "bert and its teacher", "bert by SRigL"])
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = tiny(kind, tmp_path / "teacher")
    options = Options(out=tmp_path / "once", ema=0.9)
    options.out.mkdir()
    whole = train(task, options)
    again = replace(options, out=tmp_path / "twice")
    again.out.mkdir()
    train(tiny(kind, tmp_path / "teacher"), replace(again, stop_after=1))
    resumed = train(tiny(kind, tmp_path / "teacher"), again)
    assert resumed.trainer.steps == whole.trainer.steps == 6
    assert resumed.trainer.last_update == whole.trainer.last_update
    assert whole.average is not None
    assert resumed.average is not None
    for one, other in ((whole.model, resumed.model), (whole.average, resumed.average)):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    lines = [json.loads(line) for line in (again.out / "log.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert task.score in lines[0]
    capsys.readouterr()


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert_sst2", "gpt_text"])
def test_the_smoke_run_of_a_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_recipe.py", name, "--smoke", "--out", str(tmp_path)])
    train_recipe.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 for line in lines)
    assert lines[-1]["sparsity"] == pytest.approx(train_recipe.recipes(name)["x1"].sparsity, abs=0.005)
    assert (tmp_path / "last.safetensors").exists()


def test_learning_rates() -> None:
    cycles = bert_mnli.X1
    assert [round(cycles.rate(epoch), 7) for epoch in (0, 1, 2, 4, 5.99999, 6, 28)] == [
        *(5e-5, 2.75e-5, 5e-5, 2.75e-5, 5e-6, 5e-5, 2.75e-5)
    ]
    cosine = gpt_text.X1
    steps = [step / cosine.steps_an_epoch for step in (0, 49, 99, 100, 2550, 5000)]
    assert [round(cosine.rate(step), 7) for step in steps] == [1e-5, 5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4]
    assert cosine.stretched(2).rate(40) == pytest.approx(1e-4)


@pytest.mark.long
def test_networks_are_those_that_are_named() -> None:
    with torch.device("meta"):
        sizes = [
            sum(parameter.numel() for parameter in model.parameters())
            for model in (bert_mnli.network(), bert_sst2.X1.build(False), gpt_text.network())
        ]
    # BERT-base with heads of three and two classes; nanoGPT's weights with biases, and 256 bytes for 65 characters.
    assert sizes == [109484547, 109483778, 10844160]


def test_a_folder_of_text_files_is_read_in_order_and_its_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(bytes(range(50, 100)))
    (tmp_path / "a.txt").write_bytes(bytes(range(50)))
    (tmp_path / "c.md").write_bytes(b"no text")
    train_on, held_out = read_text(str(tmp_path), 8)
    assert train_on.tolist() == list(range(90))
    assert held_out.tolist() == list(range(90, 100))
    with pytest.raises(ValueError, match=r"holds 10 bytes to train on or to hold out: a sample takes 11"):
        read_text(str(tmp_path), 10)
    with pytest.raises(ValueError, match=r"holds no file \*.txt"):
        read_text(str(tmp_path.parent), 8)


def test_samples_of_text_cover_what_is_held_out_and_differ_between_epochs_and_processes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    recipe = replace(gpt_text.X1.smoke(2), tokens=4, steps_an_epoch=3)
    both = [Language(recipe, str(tmp_path)).loaders(Reader(batch=2, processes=2, rank=rank)) for rank in (0, 1)]
    held_out = torch.cat([batch[0] for loaders in both for batch in loaders.test])
    assert sorted(held_out[:, 1:].flatten().tolist()) == list(range(181, 197))  # the rest fills no sample
    drawn = [torch.cat([batch[0] for batch in loaders.train]) for loaders in both]
    assert [len(batches) for batches in drawn] == [6, 6]
    assert all(torch.equal(rows - rows[:, :1], torch.arange(5).expand(6, 5)) for rows in drawn)
    assert not torch.equal(*drawn)
    both[0].sampler.set_epoch(1)
    assert not torch.equal(torch.cat([batch[0] for batch in both[0].train]), drawn[0])
    both[0].sampler.set_epoch(0)
    assert torch.equal(torch.cat([batch[0] for batch in both[0].train]), drawn[0])


def test_windows_end_with_the_text() -> None:
    tokens = torch.arange(10)
    assert len(Windows(tokens, 9)) == 1
    assert len(Windows(tokens, 10)) == 0
    assert Windows(tokens, 4, apart=4)[1][0].tolist() == [4, 5, 6, 7, 8]
    assert len(Windows(tokens, 4, apart=4)) == 2


def test_the_divergence_of_teacher_and_student() -> None:
    sentences = Sentences(bert_mnli.X1, None)
    found, wanted = torch.randn(4, 3), torch.randn(4, 3)
    assert sentences._divergence(wanted, wanted).item() == pytest.approx(0, abs=1e-6)
    soft = F.softmax(wanted / 2, dim=1)
    mean = (soft * (soft.log() - F.log_softmax(found / 2, dim=1))).sum(dim=1).mean()
    assert sentences._divergence(found, wanted).item() == pytest.approx(2**2 * mean.item(), rel=1e-5)


def test_without_datasets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(sx.SriglError, match=r"datasets is not installed: pip install 'srigl-fx\[recipes\]'"):
        read_text("some/corpus", 8)


@pytest.mark.parametrize(
    ("given", "words"),
    {
        "no data": (["bert_mnli"], "give either the data"),
        "no such length": (["bert_mnli", "--smoke", "--length", "x2"], "bert_mnli has the lengths x1 only"),
        "a teacher of images": (["resnet18_cifar10", "--data", "x", "--teacher", "y"], "for runs of BERT on data"),
    }.values(),
)
def test_arguments_that_do_not_fit(
    given: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_recipe.py", *given])
    with pytest.raises(SystemExit):
        train_recipe.main()
    assert words in capsys.readouterr().err


def test_what_was_published_is_said_with_how() -> None:
    assert "84.32 at 80%, 83.79 at 90%, 81.77 at 97% (oBERT, without a structure" in train_recipe.published(
        "bert_mnli", "x1"
    )
    assert "dense not published there" in train_recipe.published("bert_sst2", "x1")
    assert "x2, published: nothing; dense 1.4697" in train_recipe.published("gpt_text", "x2")
