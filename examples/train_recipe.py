"""Trains a network of the papers with SRigL, as it was published: ``examples/recipes/`` has the hyper-parameters.

    python examples/train_recipe.py resnet18_cifar10 --smoke
    python examples/train_recipe.py resnet18_cifar10 --data /data --out runs/resnet18
    torchrun --nproc-per-node 8 examples/train_recipe.py resnet50_imagenet --data /data/imagenet --length x2

What is killed goes on from its last epoch when the same command is given again. ``--smoke`` makes a few steps on random
images of the same shape, to see that all runs.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from recipes.loop import Options, train
from recipes.settings import LENGTHS, ImageRecipe, Length, smoke

NAMES = ("resnet50_imagenet", "vit_b16_imagenet", "resnet18_cifar10", "wide_resnet22_cifar10")
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def published(recipes: Mapping[Length, ImageRecipe], length: Length) -> str:
    """What the authors reached with these settings, in words."""
    recipe, found = recipes["x1"], recipes["x1"].published.get(length, {})
    told = ", ".join(f"{accuracy} at {sparsity:.0%}" for sparsity, accuracy in found.items() if sparsity)
    dense = f"dense {recipe.published['x1'][0]}"
    return f"{recipe.title}, {length}, published: {told or 'nothing'}; {dense}\nsource: {recipe.source}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=NAMES)
    parser.add_argument("--data", type=Path, help="the folder of the data")
    parser.add_argument("--out", type=Path, help="the folder of checkpoint and log (default: runs/RECIPE)")
    parser.add_argument("--length", choices=LENGTHS, default="x1", help="how long, as the paper counts")
    parser.add_argument("--sparsity", type=float, help="default 0.9")
    parser.add_argument("--amp", choices=AMP, default="none", help="the dtype of autocast")
    parser.add_argument("--ema", type=float, default=0.0, help="the decay of an average of weights, such as 0.9999")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images, for each that trains")
    parser.add_argument("--stop-after", type=int, help="epochs after which this run ends; a later one goes on")
    parser.add_argument("--smoke", action="store_true", help="a few steps on random images of the same shape")
    given = parser.parse_args()
    if given.smoke is (given.data is not None):
        parser.error("give either the folder of the data, with --data, or --smoke")
    recipes: Mapping[Length, ImageRecipe] = import_module(f"recipes.{given.recipe}").RECIPES
    recipe = recipes[given.length]
    recipe = recipe if given.sparsity is None else replace(recipe, sparsity=given.sparsity)
    options = Options(
        data=given.data,
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
        recipe = smoke(recipe, dist.get_world_size() if dist.is_initialized() else 1)
    run = train(recipe, options)
    if run.rank == 0:
        print(published(recipes, given.length))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
