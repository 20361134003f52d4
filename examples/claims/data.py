"""Real data that needs no download: scikit-learn's handwritten digits, and the sources of Python's standard library.

Owns loading and the fixed split into training and test data; it must not know the models.
"""

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Newline and the printable ASCII characters; a tab becomes a blank, every other character is left out.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 64
TEST_WINDOWS = 1024


@dataclass(frozen=True)
class Split:
    """Inputs and targets; of a text, the training half is one long sequence and its own target."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.cache
def digits() -> Split:
    """The 1797 digits as (N, 1, 8, 8) float32 images: half of each class for training, the other half for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    images = torch.as_tensor(bundle.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.as_tensor(bundle.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.5, stratify=bundle.target, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return Split(images[train], labels[train], images[test], labels[test])


@functools.cache
def library_text() -> Split:
    """The modules of the running Python's standard library, doc strings included, as indices into :data:`ALPHABET`.

    Every tenth module, in alphabetical order, is held out. The training text is (characters,) uint8; the test text
    is (:data:`TEST_WINDOWS`, :data:`CONTEXT`) int64, windows spread evenly over the held-out modules.
    """
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = encode("\n".join(_read(path) for index, path in enumerate(modules) if index % 10 != 5))
    test = encode("\n".join(_read(path) for index, path in enumerate(modules) if index % 10 == 5))
    starts = torch.linspace(0, len(test) - CONTEXT - 1, TEST_WINDOWS).long()
    windows = test[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return Split(train, train, windows[:, :-1], windows[:, 1:])


def encode(text: str) -> Tensor:
    """``text`` as uint8 indices into :data:`ALPHABET`.

    Example:
        >>> encode("a\\tb").tolist()
        [66, 1, 67]
    """
    index = {character: position for position, character in enumerate(ALPHABET)}
    codes = bytes(index[character] for character in text.replace("\t", " ") if character in index)
    return torch.frombuffer(bytearray(codes), dtype=torch.uint8)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
