"""The texts of the recipes: data sets of the hub or of a folder, as Hugging Face ``datasets`` reads them, text files,
and random tokens of the same shape.

Owns how texts become tokens, and tokens a loss and a score. It must not know networks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import srigl_fx as sx
from recipes.data import Loaders, Reader
from recipes.settings import LanguageRecipe, SentenceRecipe
from srigl_fx.integrations.attachment import extra

HELD_OUT = ("validation", "validation_matched", "test")  # the first that there is
SHARE = 0.1  # of a text that is held out where nothing else is
SMOKE_BATCHES = 2  # of each epoch of a smoke run

Batch = Mapping[str, Tensor]


class Sentences:
    """Sentences with a class each, for a BERT; without ``data``, random ones for one with random weights.

    Args:
        recipe: The hyper-parameters.
        data: A folder, such as one with ``train.csv`` and ``validation.csv``, or a data set of the hub.
        model: The pretrained one, instead of the recipe's: a folder or a name on the hub.
        teacher: A dense model of the same task, whose distribution of classes stands in the place of labels.
    """

    score = "accuracy"

    def __init__(
        self, recipe: SentenceRecipe, data: str | None, *, model: str | None = None, teacher: str | None = None
    ) -> None:
        self.recipe, self.data, self.model = recipe, data, model or recipe.model
        self.teacher = None if teacher is None else self._pretrained(teacher).requires_grad_(False)
        self._distillation = None
        if self.teacher is not None:
            self._distillation = sx.DistillationLoss(
                self.teacher, outputs=lambda returned: returned.logits, loss=self._divergence
            )

    def network(self) -> nn.Module:
        """The pretrained network, dense."""
        return self.recipe.build(True) if self.data is None else self._pretrained(self.model)

    def loaders(self, reader: Reader) -> Loaders:
        """What a process reads: batches as long as their longest sentence."""
        if self.data is None:
            return reader.loaders(*(_random_sentences(self.recipe, seed) for seed in (0, 1)))
        from transformers import AutoTokenizer, DataCollatorWithPadding

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        pad = DataCollatorWithPadding(tokenizer)
        with _first_alone():
            train, held_out = (
                _tokenized(split, tokenizer, self.recipe) for split in _train_and_held_out(_data_set(self.data))
            )
        return reader.loaders(train, held_out, collate=lambda samples: dict(pad(samples)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy, or the divergence from the teacher."""
        inputs, labels = _apart(batch)
        if self._distillation is None or self.teacher is None:
            return F.cross_entropy(model(**inputs).logits.float(), labels)
        self.teacher.to(labels.device)
        return self._distillation(model, **inputs)

    def sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """A hundred for each sentence that is classified rightly, and how many sentences there are."""
        inputs, labels = _apart(batch)
        return 100 * (model(**inputs).logits.argmax(dim=1) == labels).sum(), len(labels)

    def _pretrained(self, name: str) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        found: nn.Module = AutoModelForSequenceClassification.from_pretrained(name, num_labels=self.recipe.classes)
        return found

    def _divergence(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Of distributions that are softened by the temperature, with gradients as large as without."""
        heat = self.recipe.temperature
        ours, theirs = (F.log_softmax(logits.float() / heat, dim=-1) for logits in (found, wanted))
        return heat**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Language:
    """Running text as bytes; without ``data``, random ones.

    Args:
        recipe: The hyper-parameters.
        data: A folder with files ``*.txt``, or a data set of the hub with a column ``text``.
    """

    score = "validation_loss"

    def __init__(self, recipe: LanguageRecipe, data: str | None) -> None:
        self.recipe, self.data = recipe, data

    def network(self) -> nn.Module:
        """The network, dense."""
        return self.recipe.build()

    def loaders(self, reader: Reader) -> Loaders:
        """What a process reads: samples from anywhere to train on, all of the held-out text one after the other."""
        length, draws = self.recipe.tokens, self.recipe.steps_an_epoch * self.recipe.batch
        if self.data is None:
            numbers = torch.Generator().manual_seed(0)
            train, held_out = (torch.randint(256, (4 * length,), generator=numbers) for _ in range(2))
        else:
            train, held_out = read_text(self.data, self.recipe.tokens)
        return reader.loaders(Windows(train, length), Windows(held_out, length, apart=length), draws=draws)

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        """The mean cross-entropy of the next byte, in nats."""
        return self._entropy(model, batch, "mean")

    def sums(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        """The same as a sum, and of how many bytes."""
        return self._entropy(model, batch, "sum"), batch[0][:, 1:].numel()

    @staticmethod
    def _entropy(model: nn.Module, batch: tuple[Tensor], reduction: str) -> Tensor:
        (tokens,) = batch
        logits = model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


class Windows(Dataset[tuple[Tensor]]):
    """Samples of ``length`` tokens and the next one, which begin ``apart`` tokens from each other."""

    def __init__(self, tokens: Tensor, length: int, *, apart: int = 1) -> None:
        self.tokens, self.length, self.apart = tokens, length, apart

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.length - 1) // self.apart + 1)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        begin = index * self.apart
        return (self.tokens[begin : begin + self.length + 1].long(),)


def read_text(data: str, length: int) -> tuple[Tensor, Tensor]:
    """The bytes of a text to train on, and those of one that is held out.

    Args:
        data: A folder with files ``*.txt``, read in the order of their names, whose last tenth is held out; or a data
            set of the hub with a column ``text``, whose own split is held out where it has one.
        length: Bytes of a sample, of which each must hold one at least.

    Raises:
        ValueError: There are no such files, or too few bytes.
    """
    folder = Path(data)
    if folder.is_dir():
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise ValueError(f"{folder} holds no file *.txt: give the folder that the texts lie in")
        found = [_bytes(path.read_bytes() for path in files)]
    else:
        with _first_alone():
            found = [_bytes(_lines(split)) for split in _train_and_held_out(_data_set(data), one=True)]
    if len(found) == 1:
        cut = round((1 - SHARE) * len(found[0]))
        found = [found[0][:cut], found[0][cut:]]
    if short := [part for part in found if len(part) <= length]:
        raise ValueError(f"{data} holds {len(short[0])} bytes to train on or to hold out: a sample takes {length + 1}")
    train, held_out = found
    return train, held_out


def _bytes(texts: Iterable[bytes]) -> Tensor:
    joined = bytearray().join(texts)
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0, dtype=torch.uint8)


def _lines(split: Any) -> Iterator[bytes]:
    """The rows of a column, each of which ends a line."""
    if "text" not in split.column_names:
        raise ValueError(f"the data set has no column 'text', but {', '.join(split.column_names)}")
    for row in split["text"]:
        yield (row if row.endswith("\n") else f"{row}\n").encode()


def _data_set(data: str) -> Any:
    """The splits of a folder, or of a data set of the hub: NAME, or NAME:CONFIGURATION."""
    with extra("recipes", "datasets"):
        from datasets import load_dataset
    name, _, configuration = (data, "", "") if Path(data).is_dir() else data.partition(":")
    return load_dataset(name, configuration or None)


def _train_and_held_out(splits: Any, *, one: bool = False) -> list[Any]:
    """The two splits that a run reads; only the first where there is no other and ``one`` is enough."""
    held_out = next((name for name in HELD_OUT if name in splits), None)
    if "train" not in splits or (held_out is None and not one):
        raise ValueError(
            f"the data set has the splits {', '.join(splits)}; it takes train and one of {', '.join(HELD_OUT)}: call "
            "files in a folder so, train.csv and validation.csv say"
        )
    return [splits["train"], *([] if held_out is None else [splits[held_out]])]


def _tokenized(split: Any, tokenizer: Any, recipe: SentenceRecipe) -> Any:
    """The rows of a split as tokens and labels."""
    columns = [
        name for name, kind in split.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    if "label" not in split.features or not 1 <= len(columns) <= 2:
        raise ValueError(
            f"the data set has the columns {', '.join(split.features)}: it takes one or two of text, and the class as "
            "a whole number in 'label'"
        )
    if odd := set(split.unique("label")) - set(range(recipe.classes)):
        raise ValueError(
            f"{recipe.title} has the classes 0 to {recipe.classes - 1}, but a row has the label {next(iter(odd))!r}"
        )

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[name] for name in columns]
        return {**tokenizer(*texts, truncation=True, max_length=recipe.tokens), "labels": rows["label"]}

    return split.map(encode, batched=True, remove_columns=split.column_names)


def _random_sentences(recipe: SentenceRecipe, seed: int) -> Any:
    """Samples of random tokens, none of them padding."""
    numbers = torch.Generator().manual_seed(seed)
    count = SMOKE_BATCHES * recipe.batch
    ids = torch.randint(1000, (count, recipe.tokens), generator=numbers)
    labels = torch.randint(recipe.classes, (count,), generator=numbers)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    rows = zip(ids, ones, zeros, labels, strict=True)
    return [dict(zip(("input_ids", "attention_mask", "token_type_ids", "labels"), row, strict=True)) for row in rows]


def _apart(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """What the model is given, and the classes."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}, batch["labels"]


@contextmanager
def _first_alone() -> Iterator[None]:
    """The first process of several goes first, so that the others find what it has loaded and kept."""
    if dist.is_initialized() and dist.get_rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not dist.get_rank():
        dist.barrier()
