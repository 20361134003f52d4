"""Trains a network of the papers sparsely, as it was published: ``examples/recipes/`` has the hyper-parameters.

    python examples/train_recipe.py resnet18_cifar10 --smoke
    python examples/train_recipe.py resnet18_cifar10 --data /data --out runs/resnet18
    python examples/train_recipe.py bert_sst2 --data nyu-mll/glue:sst2 --model google-bert/bert-base-uncased
    torchrun --nproc-per-node 8 examples/train_recipe.py resnet50_imagenet --data /data/imagenet --length x2

What is killed goes on from its last epoch when the same command is given again. ``--smoke`` makes a few steps on random
images or tokens of the same shape, to see that all runs.
"""

import argparse
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from recipes.images import Images
from recipes.loop import Options, Task, train
from recipes.settings import LENGTHS, METHODS, ImageRecipe, LanguageRecipe, Length, Recipe, SentenceRecipe
from recipes.text import Language, Sentences

NAMES = (
    *("resnet50_imagenet", "vit_b16_imagenet", "resnet18_cifar10", "wide_resnet22_cifar10"),
    *("bert_mnli", "bert_sst2", "gpt_text"),
)
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def recipes(name: str) -> dict[Length, Recipe]:
    """The recipes of a name, by their lengths."""
    found: dict[Length, Recipe] = import_module(f"recipes.{name}").RECIPES
    return found


def published(name: str, length: Length) -> str:
    """What the authors reached with these settings, or others on the same data, in words."""
    recipe = recipes(name)["x1"]
    found = recipe.published.get(length, {})
    told = ", ".join(f"{score} at {sparsity:.0%}" for sparsity, score in found.items() if sparsity)
    told = f"{told} ({recipe.published_with})" if told else "nothing"
    dense = recipe.published["x1"].get(0, "not published there")
    return f"{recipe.title}, {length}, published: {told}; dense {dense}\nsource: {recipe.source}"


def task(recipe: Recipe, data: str | None, model: str | None = None, teacher: str | None = None) -> Task:
    """A recipe with its data."""
    if isinstance(recipe, ImageRecipe):
        return Images(recipe, None if data is None else Path(data))
    if isinstance(recipe, SentenceRecipe):
        return Sentences(recipe, data, model=model, teacher=teacher)
    assert isinstance(recipe, LanguageRecipe)
    return Language(recipe, data)


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=NAMES)
    parser.add_argument("--data", help="the folder of the data, or for texts a data set of the hub, NAME:CONFIGURATION")
    parser.add_argument("--out", type=Path, help="the folder of checkpoint and log (default: runs/RECIPE)")
    parser.add_argument("--length", choices=LENGTHS, default="x1", help="how long, as the paper counts")
    parser.add_argument("--sparsity", type=float, help="instead of the recipe's")
    parser.add_argument("--method", choices=METHODS, help="SRigL or gradual pruning, instead of the recipe's")
    parser.add_argument("--model", help="the pretrained BERT: a folder, or a name on the hub")
    parser.add_argument("--teacher", help="a dense BERT of the task, to distil from: a folder, or a name on the hub")
    parser.add_argument("--amp", choices=AMP, default="none", help="the dtype of autocast")
    parser.add_argument("--ema", type=float, default=0.0, help="the decay of an average of weights, such as 0.9999")
    parser.add_argument("--workers", type=int, default=8, help="processes that read the data, for each that trains")
    parser.add_argument("--stop-after", type=int, help="epochs after which this run ends; a later one goes on")
    parser.add_argument("--smoke", action="store_true", help="a few steps on random data of the same shape")
    return parser


def main() -> None:
    """The command."""
    parser = arguments()
    given = parser.parse_args()
    if given.smoke is (given.data is not None):
        parser.error("give either the data, with --data, or --smoke")
    lengths = recipes(given.recipe)
    if given.length not in lengths:
        parser.error(f"{given.recipe} has the lengths {', '.join(lengths)} only")
    recipe = lengths[given.length]
    if (given.model or given.teacher) and (given.smoke or not isinstance(recipe, SentenceRecipe)):
        parser.error("--model and --teacher are for runs of BERT on data")
    recipe = recipe if given.sparsity is None else replace(recipe, sparsity=given.sparsity)
    recipe = recipe if given.method is None else replace(recipe, method=given.method)
    options = Options(
        out=given.out or Path("runs", given.recipe),
        amp=AMP[given.amp],
        ema=given.ema,
        workers=0 if given.smoke else given.workers,
        stop_after=given.stop_after,
    )
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    if given.smoke:
        recipe = recipe.smoke(dist.get_world_size() if dist.is_initialized() else 1)
    run = train(task(recipe, given.data, given.model, given.teacher), options)
    if run.rank == 0:
        print(published(given.recipe, given.length))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
