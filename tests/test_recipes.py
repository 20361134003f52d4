"""The recipes of the papers: what they say, and that a short run of each part works and goes on after a stop."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import train_recipe
from recipes.images import Batch, Loaders
from recipes.loop import Options, Run, train
from recipes.settings import LENGTHS, ImageRecipe, smoke, stretched
from recipes.wide_resnet22_cifar10 import X1, network

import srigl_fx as sx

ALL = {name: import_module(f"recipes.{name}").RECIPES for name in train_recipe.NAMES}


@pytest.mark.parametrize("name", ALL)
def test_each_length_has_a_recipe_that_can_be_cut(name: str) -> None:
    assert tuple(ALL[name]) == LENGTHS
    for recipe in ALL[name].values():
        assert recipe.batch % recipe.micro_batches == 0
        assert bool(recipe.milestones) is not bool(recipe.cosine_epochs)
        assert recipe.rate(0) > 0
        assert all(milestone < recipe.epochs for milestone in recipe.milestones)
    lengths = [recipe.epochs for recipe in ALL[name].values()]
    assert lengths == sorted(lengths)
    assert 0.75 < ALL[name]["x2"].epochs / (2 * lengths[0]) < 1.25


def test_updates_of_resnet50_look_at_as_many_images_at_each_length() -> None:
    assert {recipe.batch * recipe.grad_samples for recipe in ALL["resnet50_imagenet"].values()} == {4096}
    assert {recipe.batch * recipe.update_every for recipe in ALL["resnet50_imagenet"].values()} == {512 * 800}


def test_learning_rates() -> None:
    steps = ALL["resnet50_imagenet"]["x1"]
    assert [round(steps.rate(epoch), 6) for epoch in (0, 4, 5, 29, 30, 70, 90)] == [
        *(0.040001, 0.2, 0.2, 0.2, 0.02, 0.002, 0.0002)
    ]
    cosine = ALL["vit_b16_imagenet"]["x1"]
    assert cosine.rate(15) == cosine.rate(16) == pytest.approx(3e-3)
    assert cosine.rate(96) == pytest.approx(1.5e-3)
    assert stretched(cosine, 2).rate(192) == pytest.approx(1.5e-3)


def test_the_wide_network_is_that_of_the_paper() -> None:
    convolutions = [module for module in network().modules() if isinstance(module, torch.nn.Conv2d)]
    assert len([one for one in convolutions if one.kernel_size == (3, 3)]) == 19  # 22, with the head and two shortcuts
    assert network()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def tiny(**changes: object) -> ImageRecipe:
    """A small network under the settings of a recipe, everything switched on."""
    recipe = replace(
        X1, build=lambda: network(depth=10, width=1), sparsity=0.5, micro_batches=2, batch=8, clip=1.0, mix=True
    )
    return replace(smoke(recipe), epochs=3, **changes)  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(optimizer=optimizer)
    options = Options(data=None, out=tmp_path / "once", ema=0.9)
    options.out.mkdir()
    whole = train(recipe, options)
    again = replace(options, out=tmp_path / "twice")
    again.out.mkdir()
    train(recipe, replace(again, stop_after=1))
    resumed = train(recipe, again)
    assert resumed.trainer.steps == whole.trainer.steps == 6
    assert resumed.trainer.last_update == whole.trainer.last_update
    assert whole.average is not None
    assert resumed.average is not None
    for one, other in ((whole.model, resumed.model), (whole.average, resumed.average)):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    lines = [json.loads(line) for line in (again.out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines == [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["active_share"] <= 1
    masks = [mask for _, mask in sx.masks.named_masks(whole.model)]
    zeros = sum(mask.numel() - int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert lines[-1]["sparsity"] == pytest.approx(zeros, abs=0.001)
    capsys.readouterr()


@pytest.mark.long
def test_parts_that_make_no_whole_batch_are_left_out(tmp_path: Path) -> None:
    run = Run(tiny(batch=4), Options(data=None, out=tmp_path), 0, 1)
    images: Any = TensorDataset(torch.randn(10, 3, 32, 32), torch.zeros(10, dtype=torch.long))
    sampler: DistributedSampler[Batch] = DistributedSampler(images, 1, 0)
    run.data = Loaders(DataLoader(images, 2, sampler=sampler), run.data.test, sampler)
    run.steps_an_epoch = 2
    run.epoch(0)
    assert run.trainer.steps == 2
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 cannot be cut into 3 parts"):
        train(tiny(batch=4, micro_batches=3), Options(data=None, out=tmp_path))


@pytest.mark.long
def test_the_smoke_run_of_a_recipe_on_two_processes(checkout: Path, tmp_path: Path) -> None:
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launched, str(checkout / "examples" / "train_recipe.py"), "wide_resnet22_cifar10", "--smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "published: 94.6 at 50%, 94.05 at 80%, 93.27 at 90%" in done.stdout
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "last.safetensors").exists()
