"""Weights from a file into a model: a checkpoint of ours, or a state dict.

Owns which kind a file is, and the words for what does not fit. Files are untrusted: none is read by pickle beyond what
``torch.load(weights_only=True)`` allows. It must not know where the model comes from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from srigl_fx.errors import CheckpointError
from srigl_fx.masks.records import MASK_SUFFIX, plain, sparse_weights

_INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where training scripts keep the weights
_OURS = "srigl_fx.checkpoint"
_MOST = 3  # names that an error lists


def load_weights(model: nn.Module, path: Path, example_inputs: Any) -> str:
    """Load a file's weights into a model, in place, and say in words what they were.

    A dense model becomes sparse first if the file is a checkpoint of ours that holds a recipe.

    Args:
        model: Dense, or sparse as the one that was saved.
        path: What :func:`srigl_fx.train.checkpoint.save` wrote; or a state dict, by ``torch.save`` or in safetensors,
            by itself or beside other things.
        example_inputs: As for :func:`srigl_fx.sparsify`; needed where that needed them.

    Raises:
        CheckpointError: There is no such file, it is none of these, or it does not fit the model.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if (metadata := _safetensors_metadata(path)) is not None and _OURS in metadata:
        return _load_ours(model, path, example_inputs)
    _load_state(model, _read_state(path, safetensors=metadata is not None), path)
    return "a state dict"


def _safetensors_metadata(path: Path) -> dict[str, str] | None:
    """What a file of safetensors says of itself; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return None


def _load_ours(model: nn.Module, path: Path, example_inputs: Any) -> str:
    from srigl_fx.recipe_parts import from_plain
    from srigl_fx.sparsification import sparsify
    from srigl_fx.train import checkpoint
    from srigl_fx.train.checkpoint_file import read

    if not sparse_weights(model):
        for part, one in from_plain(read(path).get("recipes")).items():
            try:
                whole = model.get_submodule(part)
            except AttributeError as error:
                raise CheckpointError(f"{path} holds a recipe of the part {part!r}, which this model lacks") from error
            sparsify(whole, recipe=one, example_inputs=None if part else example_inputs)
    checkpoint.load(path, model=model)
    return "a checkpoint of srigl_fx"


def _read_state(path: Path, *, safetensors: bool) -> dict[str, Tensor]:
    """The tensors of a state dict by name, without what wrappers put before the names."""
    if safetensors:
        from safetensors.torch import load_file

        read: Any = load_file(path)
    else:
        try:
            read = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever bytes make a parser raise
            raise CheckpointError(
                f"{path} is no checkpoint: it is damaged, or holds more than tensors and plain values, which would "
                "have to be run to be read; save model.state_dict() alone"
            ) from error
    for name in _INSIDE:
        if isinstance(read, Mapping) and isinstance(read.get(name), Mapping):
            read = read[name]
            break
    if not isinstance(read, Mapping) or not any(isinstance(value, Tensor) for value in read.values()):
        raise CheckpointError(f"{path} holds no state dict: a {type(read).__name__} without tensors by name")
    return {plain(str(name)): value for name, value in read.items()}


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict that fits, and nothing of one that does not."""
    live = model.state_dict()
    names = {plain(name): name for name in live}
    for group in _tied(model):
        if (held := next((name for name in group if name in state), None)) is not None:
            state |= {name: state.get(name, state[held]) for name in group}
    problems = []
    if missing := sorted(names.keys() - state.keys()):
        problems.append(f"it lacks {_listed(missing)}")
    if unknown := sorted(state.keys() - names.keys()):
        problems.append(f"the model lacks {_listed(unknown)}")
    for name in sorted(names.keys() & state.keys()):
        theirs, ours = state[name], live[names[name]]
        if isinstance(ours, Tensor) and (not isinstance(theirs, Tensor) or theirs.shape != ours.shape):
            shape = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
            problems.append(f"{name} is {shape} there, but {tuple(ours.shape)} here")
            break
        if isinstance(ours, Tensor) and not _can_be_copied(theirs, ours):
            problems.append(f"{name} is no plain tensor there ({theirs.dtype}, {theirs.layout}, {theirs.device})")
            break
    if problems:
        masks = [name for name in (*missing, *unknown) if name.endswith(MASK_SUFFIX)]
        hint = (
            "; it is of a sparse model: let the function sparsify its model as for training, or give a checkpoint of "
            "srigl_fx, which holds the recipe"
            if masks and masks[0] in unknown
            else "; it is of a dense model: leave sparsify out, and give --adopt if its weights hold zeros"
            if masks
            else ""
        )
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems)}{hint}")
    model.load_state_dict({names[name]: value for name, value in state.items()})


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several, as tied weights have: safetensors keeps but one of them."""
    names: dict[int, list[str]] = {}
    parameters, buffers = (find(remove_duplicate=False) for find in (model.named_parameters, model.named_buffers))
    for name, tensor in (*parameters, *buffers):
        names.setdefault(id(tensor), []).append(plain(name))
    return [group for group in names.values() if len(group) > 1]


def _can_be_copied(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a tensor holds numbers that another can take: one by one, and real where these are."""
    is_plain = theirs.layout is torch.strided and not theirs.is_quantized and not theirs.is_meta
    return is_plain and (ours.is_complex() or not theirs.is_complex())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
