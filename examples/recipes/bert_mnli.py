"""BERT on MultiNLI, made sparse while it is fine-tuned, 30 epochs.

    torchrun --nproc-per-node 4 examples/train_recipe.py bert_mnli --data nyu-mll/glue:mnli --amp float16 \
        --teacher neuralmagic/oBERT-teacher-mnli
    python examples/train_recipe.py bert_mnli --smoke

Learning rates, batches, epochs, what is pruned and when, and the distillation are those that were published for the
Optimal BERT Surgeon. Another thing is how: magnitudes choose what goes, steadily from the first step on, and every
neuron keeps as many weights; there it was second-order information, over all layers together, every four epochs. With
``--method srigl`` the masks are sparse from the beginning on.

A smoke run has two of the twelve layers, and a vocabulary of 1,000.
"""

from typing import Any

import torch
from torch import Tensor, nn

from recipes.settings import Length, SentenceRecipe

OBERT = (
    "Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022 (arXiv 2203.07259), and its recipes in neuralmagic/sparseml"
)


def network(smoke: bool = False, *, classes: int = 3) -> nn.Module:
    """BERT-base, not trained."""
    from transformers import BertConfig, BertForSequenceClassification

    changes: dict[str, Any] = {"num_labels": classes}
    if smoke:
        changes |= {"num_hidden_layers": 2, "vocab_size": 1000}
    model: nn.Module = BertForSequenceClassification(BertConfig(**changes))
    return model


X1 = SentenceRecipe(
    title="BERT-base on MNLI",
    source=OBERT,
    build=network,
    model="google-bert/bert-base-uncased",
    data="nyu-mll/glue:mnli",
    tokens=128,
    classes=3,
    epochs=30,
    batch=32,
    optimizer="adamw",
    learning_rate=5e-5,
    weight_decay=0.0,
    final_rate=5e-6,
    first_cycle=2,
    cycle=4,
    clip=1.0,  # what the Trainer of transformers does by default
    temperature=2.0,
    method="gmp",
    distribution="uniform",
    dense=("*pooler*", "classifier"),
    weight_init="keep",
    ablation=None,  # ours: nothing says that a trained neuron should go
    update_every=None,  # ours: at every 320th part of the steps
    stop_at=26 / 30,
    published={"x1": {0: 84.54, 0.8: 84.32, 0.9: 83.79, 0.97: 81.77}},
    published_with="oBERT, without a structure, with distillation",
)
RECIPES: dict[Length, SentenceRecipe] = {"x1": X1}


def example(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """The network and an input: tokens, which of them are no padding, and of which sentence."""
    tokens = torch.randint(1000, (2, 32))
    return model, (tokens, torch.ones_like(tokens), torch.zeros_like(tokens))


def build() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """For ``srigl-fx export``."""
    return example(network())


def build_smoke() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """The same of a smoke run."""
    return example(network(True))
