"""A GPT of 10.8 million weights on text, byte by byte, with SRigL, 5,000 steps.

    python examples/train_recipe.py gpt_text --data shakespeare   # a folder with files *.txt
    python examples/train_recipe.py gpt_text --data Salesforce/wikitext:wikitext-2-raw-v1
    python examples/train_recipe.py gpt_text --smoke
    srigl-fx export recipes.gpt_text:build --checkpoint ../runs/gpt_text/last.safetensors ../model.onnx

The settings of training are those of nanoGPT for the works of Shakespeare (1.1 million characters, one byte each);
those of sparsity are ours: queries, keys and values stay dense, as in the published ViT-B/16.
"""

import torch
from torch import Tensor, nn

from recipes.settings import LanguageRecipe, Length

NANOGPT = (
    "Karpathy, nanoGPT (github.com/karpathy/nanoGPT), config/train_shakespeare_char.py and train.py; sparsity: ours"
)
TOKENS = 256


def network() -> nn.Module:
    """A GPT-2 of six layers, not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=TOKENS,
        n_embd=384,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        attn_pdrop=0.2,
        use_cache=False,
        bos_token_id=None,  # every byte is text: none begins or ends it
        eos_token_id=None,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


X1 = LanguageRecipe(
    title="GPT on text",
    source=NANOGPT,
    build=network,
    tokens=TOKENS,
    steps_an_epoch=250,
    epochs=20,
    batch=64,
    optimizer="adamw",
    learning_rate=1e-3,
    final_rate=1e-4,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    decay_vectors=False,
    warmup_epochs=100 / 250,
    clip=1.0,
    sparsity=0.8,
    distribution="uniform",
    dense=("*c_attn*",),
    weight_init="torch",
    ablation=0.3,
    update_every=None,
    published={"x1": {0: 1.4697}},  # the best validation loss, in nats a character
)
RECIPES: dict[Length, LanguageRecipe] = {"x1": X1, "x2": X1.stretched(2), "x5": X1.stretched(5)}


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The network and an input, for ``srigl-fx export``."""
    return network(), (torch.randint(256, (2, 64)),)
