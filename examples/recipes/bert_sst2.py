"""BERT on SST-2, made sparse while it is fine-tuned, 30 epochs.

    python examples/train_recipe.py bert_sst2 --data nyu-mll/glue:sst2 --amp bfloat16
    python examples/train_recipe.py bert_sst2 --data reviews   # a folder of train.csv and validation.csv: text, label
    python examples/train_recipe.py bert_sst2 --smoke
    srigl-fx export recipes.bert_sst2:build --checkpoint ../runs/bert_sst2/last.safetensors ../model.onnx

The settings are those of MNLI: of SST-2 nobody has published any for pruning on the task itself.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from recipes.bert_mnli import X1 as MNLI
from recipes.bert_mnli import example, network
from recipes.settings import Length, SentenceRecipe

X1 = replace(
    MNLI,
    title="BERT-base on SST-2",
    source=f"as for MNLI: {MNLI.source}",
    build=partial(network, classes=2),
    data="nyu-mll/glue:sst2",
    classes=2,
    # Zafrir et al., 2021 (arXiv 2111.05754), their repository's table: means of two seeds.
    published={"x1": {0.85: 91.46, 0.9: 90.88}},
    published_with="Prune Once for All, without a structure, pruned on Wikipedia before",
)
RECIPES: dict[Length, SentenceRecipe] = {"x1": X1}


def build() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """For ``srigl-fx export``."""
    return example(network(classes=2))


def build_smoke() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """The same of a smoke run."""
    return example(network(True, classes=2))
