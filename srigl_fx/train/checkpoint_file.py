"""One safetensors file that holds nested Python values and tensors, without pickle.

Owns the encoding, the check that a file is whole, and writing a file that appears whole or not at all. It must not
know models, optimizers or trainers: what a value means is checked by whoever asked for it
(:mod:`srigl_fx.train.checkpoint`).

Tensors are stored under readable names, such as ``model.0.weight``; the structure around them is JSON in the file's
metadata. There, a container is an object with one key that says its type, so that tuples, integer keys and numbers
that JSON does not know come back as they were.
"""

import hashlib
import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from srigl_fx.errors import CheckpointError
from srigl_fx.files import replacing

VERSION = "1"
_FORMAT, _TREE, _DIGEST = "srigl_fx.checkpoint", "srigl_fx.tree", "srigl_fx.sha256"

_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64}
    | {torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
    | {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)


def write(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, tuples, tensors and plain values to one file, whole or not at all.

    The bytes go to a new file in the same folder, reach the disk, and only then take the place of ``path``: whoever
    opens ``path`` at any moment, also after a crash, finds the old file or the new one.

    Args:
        path: The file; its folder exists.
        value: What to store, by name.

    Raises:
        CheckpointError: Something in ``value`` has no place in such a file, or it cannot be written; an existing file
            is left as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/state.safetensors", {"step": 7, "betas": (0.9, 0.999), "weight": torch.ones(2)})
        ...     read(f"{folder}/state.safetensors")
        {'step': 7, 'betas': (0.9, 0.999), 'weight': tensor([1., 1.])}
    """
    encoder = _Encoder()
    tree = json.dumps({name: encoder.encode(item, name) for name, item in value.items()}, allow_nan=False)
    metadata = {_FORMAT: VERSION, _TREE: tree, _DIGEST: _digest(tree, encoder.tensors)}
    try:
        with replacing(path) as part:
            part.touch()
            mode = part.stat().st_mode
            safetensors.torch.save_file(encoder.tensors, part, metadata)  # in a file of its own, closed to all others
            part.chmod(mode)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot be written: {why}; give the path of a file in a folder that exists, with "
            "space left"
        ) from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write` was given; all tensors are on the CPU, none shares memory with another.

    Nothing in the file is trusted or run.

    Raises:
        CheckpointError: The file does not exist, is damaged, or was not written by :func:`write`.
    """
    try:
        data = Path(path).read_bytes()  # at once: the file may be replaced at any moment
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        if (found := metadata.get(_FORMAT)) != VERSION:
            raise CheckpointError(
                f"{path} is no checkpoint of srigl_fx: save one with srigl_fx.train.checkpoint.save"
                if found is None
                else f"{path} is a checkpoint of version {found}, but this srigl_fx reads {VERSION}: update it"
            )
        if metadata[_DIGEST] != _digest(metadata[_TREE], tensors):
            raise ValueError("its contents are not those that were written")
        decoder = _Decoder(tensors)
        value = {name: decoder.decode(item) for name, item in json.loads(metadata[_TREE]).items()}
        if unused := tensors.keys() - decoder.used:
            raise ValueError(f"nothing refers to the tensor {min(unused)}")
        return value
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:
        # Whatever untrusted bytes make a parser raise means the same to the caller.
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of srigl_fx ({type(error).__name__}: {error}): load another one"
        ) from error


class _Encoder:
    """Turns values into JSON, and collects their tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()
        self._alive: list[Tensor] = []

    def encode(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, where)}
        if type(value) in (dict, OrderedDict, Counter):
            kind = "counter" if type(value) is Counter else "dict"
            pairs = [[self._key(key, where), self.encode(item, f"{where}.{key}")] for key, item in value.items()]
            return {kind: pairs}
        if type(value) in (list, tuple):
            items = [self.encode(item, f"{where}.{index}") for index, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if value is None or type(value) in (bool, int, str):
            return value
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only tensors, numbers, strings, "
            "None, and dicts, lists and tuples of them"
        )

    def _key(self, key: Any, where: str) -> Any:
        if key is None or type(key) in (bool, int, str):
            return key
        raise CheckpointError(f"{where} has the key {key!r}, but only strings and whole numbers can be keys")

    def _store(self, tensor: Tensor, where: str) -> str:
        """The name under which the tensor is stored: that of an earlier one if it is the same memory."""
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{where} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}), but such a file holds "
                "ordinary tensors only: use torch.distributed.checkpoint for sharded ones"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{where} is of {tensor.dtype}, which safetensors cannot hold: convert it")
        tensor = tensor.detach()
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and memory in self._stored:
            return self._stored[memory]
        self._alive.append(tensor)  # an address means nothing once its tensor is gone
        name = where
        while name in self.tensors:
            name += "_"
        held = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        if held.untyped_storage().data_ptr() in self._storages:
            held = held.clone()
        self._storages.add(held.untyped_storage().data_ptr())
        self.tensors[name] = held
        self._stored[memory] = name
        return name


class _Decoder:
    """The inverse of :class:`_Encoder`; raises many things on bad data."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.used: set[str] = set()
        self._tensors = tensors

    def decode(self, item: Any) -> Any:
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, list):
            return [self.decode(entry) for entry in item]
        (kind, content), *more = item.items()
        if more:
            raise ValueError(f"a container of {len(item)} types")
        match kind:
            case "tensor":
                tensor = self._tensors[content]
                first = content not in self.used
                self.used.add(content)
                return tensor if first else tensor.clone()
            case "float" if content in ("nan", "inf", "-inf"):
                return float(content)
            case "tuple":
                return tuple(self.decode(entry) for entry in content)
            case "dict" | "counter":
                decoded = {key: self.decode(entry) for key, entry in content}
                if len(decoded) != len(content):
                    raise ValueError("a dict with the same key twice")
                return Counter(decoded) if kind == "counter" else decoded
        raise ValueError(f"a container of the unknown type {kind!r}")


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    """A hash of everything that a file says."""
    digest = hashlib.sha256(tree.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
