"""Saving a training run to one file, and resuming it: model, optimizer and trainer together.

Owns what belongs into such a file and whether a file fits the run at hand. It must not know how the file is laid out
(:mod:`srigl_fx.train.checkpoint_file`) or what a trainer saves (:mod:`srigl_fx.train.base`).

A file is untrusted: everything that can be wrong with it is found before the first write to model, optimizer or
trainer. Tensors that are spread over processes belong into torch.distributed.checkpoint, which takes the same three
state dicts.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import CheckpointError, InvariantError, SriglError
from srigl_fx.masks.invariants import verify
from srigl_fx.masks.optimizer_probe import ProbeError, needs, small_shape
from srigl_fx.masks.records import MASK_SUFFIX, plain, set_records, sparse_weights
from srigl_fx.masks.shards import is_sharded
from srigl_fx.nn.permuted import as_saved
from srigl_fx.recipe_parts import from_plain, parts_of, to_plain
from srigl_fx.recipes import Recipe, recipes_of
from srigl_fx.train.base import Trainer
from srigl_fx.train.checkpoint_file import read, write
from srigl_fx.train.state import check_layout, layout

# Options that choose an implementation: None leaves the choice to the optimizer.
_SWITCHES = frozenset({"foreach", "fused"})
# Optimizer state that is one number for each parameter, in torch's optimizers.
_NUMBERS = frozenset({"step", "mu_product", "mu", "eta"})


def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    trainer: Trainer | None = None,
    extra: Mapping[str, Any] | None = None,
    include_gradients: bool = False,
) -> None:
    """Write a checkpoint: one safetensors file, without pickle, that appears whole or not at all.

    Model weights are in it under ``model.<name>``, for any reader of safetensors. A crash at any moment leaves the
    file that was there before.

    Args:
        path: The file, in a folder that exists.
        model: Its ``state_dict()`` is saved, masks included, under the names of the unwrapped model.
        optimizer: Its ``state_dict()`` is saved.
        trainer: Its ``state_dict()`` is saved.
        extra: Anything else, by name, made of tensors, numbers, strings, None, dicts, lists and tuples: the state of a
            scheduler or of a gradient scaler, ``torch.get_rng_state()``, the epoch.
        include_gradients: Save the gradients of an unfinished step too, for a save between two micro-batches.

    Raises:
        CheckpointError: Something cannot be stored, its name is in the message, or the file cannot be written.
        InvariantError: The model is not what its masks say, and could not be loaded as it is.

    Example:
        >>> import tempfile
        >>> import srigl_fx as sx
        >>> def build():
        ...     model = sx.sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     return {"model": model, "optimizer": optimizer, "trainer": sx.SRigL(model, optimizer, total_steps=1000)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/last.safetensors", **build(), extra={"epoch": 3})
        ...     load(f"{folder}/last.safetensors", **build())
        {'epoch': 3}
    """
    if include_gradients and trainer is None:
        raise CheckpointError("gradients are part of the trainer's state: pass trainer= to save them")
    if not isinstance(extra, Mapping | None):
        raise CheckpointError(f'extra is a {type(extra).__name__}, but must be a dict: extra={{"epoch": 3}}')
    verify(model)
    contents: dict[str, Any] = {
        "model": {plain(name): value for name, value in _live(model).items()},
        "layout": layout(model),
        "recipes": to_plain(recipes_of(model)),
        "optimizer": None,
        "trainer": None,
        "extra": dict(extra or {}),
    }
    if optimizer is not None:
        contents["optimizer"] = {"class": type(optimizer).__name__, **optimizer.state_dict()}
    if trainer is not None:
        contents["trainer"] = trainer.state_dict(include_gradients)
    write(path, contents)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Resume from a checkpoint: load model, optimizer and trainer, as far as they are given.

    A checkpoint of a dense model loads into a sparse one: its masks stay, and the weights are multiplied by them.

    Args:
        path: A file that :func:`save` wrote; it may come from anywhere, nothing in it is run.
        model: Built and sparsified as the saved one was; wrapped or not.
        optimizer: Of the saved one's class, with its groups of parameters.
        trainer: Of the saved one's class, attached to model and optimizer.

    Returns:
        The ``extra`` that was saved, empty where there was none.

    Raises:
        CheckpointError: The file is damaged or foreign, or it does not fit: it is of another model, sparsity,
            structure, optimizer or method. Model, optimizer and trainer are as they were.
    """
    contents = read(path)
    try:
        saved, masked, extra = contents["model"], contents["layout"], contents["extra"]
        if not all(isinstance(part, dict) for part in (saved, masked, extra, *masked.values())):
            raise CheckpointError("its parts are not what they should be")
        own = _check_model(model, saved, masked)
        _check_masks(model, own, pruning=trainer is None or trainer.prunes_from_dense)
        if optimizer is not None:
            _check_optimizer(optimizer, contents["optimizer"])
        if trainer is not None:
            if contents["trainer"] is None:
                raise CheckpointError("it was saved without a trainer: load it without, or start anew from the model")
            trainer.check_state_dict(contents["trainer"])
    except SriglError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    except Exception as error:
        # A file whose checksum is right may still hold anything.
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}): load another one") from error
    if optimizer is not None:
        optimizer.load_state_dict(contents["optimizer"])
    model.load_state_dict(own)
    if trainer is not None:
        trainer.load_state_dict(contents["trainer"])
    return dict(extra)


def recipe(path: str | os.PathLike[str], part: str | None = None) -> Recipe:
    """The recipe of the model in a checkpoint, for ``sparsify(model, recipe=...)`` before the rest is loaded.

    Args:
        path: A file that :func:`save` wrote.
        part: The name of the module that ``sparsify`` was called with, "" for the model itself; needed where parts of
            the model were sparsified by calls of their own.

    Raises:
        CheckpointError: The file is damaged, foreign, or holds no such recipe.
        RecipeError: The recipe is damaged, or of a newer version.

    Example:
        >>> import tempfile, srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(32, 16)), sparsity=0.75)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/last.safetensors", model=model)
        ...     again = sx.sparsify(nn.Sequential(nn.Linear(32, 16)), recipe=recipe(f"{folder}/last.safetensors"))
        ...     load(f"{folder}/last.safetensors", model=again)
        {}
    """
    found = from_plain(read(path).get("recipes"))
    if part is None and len(found) == 1:
        return next(iter(found.values()))
    if part is not None and part in found:
        return found[part]
    if not found:
        raise CheckpointError(f"{path} holds no recipe: its model is dense, or was saved by a release that kept none")
    raise CheckpointError(f"{path} holds {parts_of(found)}")


def _live(model: nn.Module) -> "OrderedDict[str, Any]":
    """The model's state_dict, where every name is one of the unwrapped model too."""
    state = cast("OrderedDict[str, Any]", model.state_dict())
    if len({plain(name) for name in state}) != len(state):
        raise CheckpointError(f"names of {type(model).__name__} are the same but for 'module.' or '_orig_mod.'")
    return state


def _check_model(model: nn.Module, saved: dict[str, Any], masked: dict[str, Any]) -> "OrderedDict[str, Any]":
    """Require that the saved state is one of ``model``, or of its dense self; return it under the model's names."""
    have = layout(model)
    live = as_saved(_live(model), saved, model)
    names = {plain(name): name for name in live}
    if masked and not have:
        raise CheckpointError(
            "it is of a sparse model and this one is dense: sparsify it first, with the arguments of the saved run, "
            "and call srigl_fx.finalize(model) after loading for the plain model"
        )
    if masked:
        check_layout(masked, have)
    else:
        names = {name: own for name, own in names.items() if name in saved or not _is_mask(name, have)}
    if saved.keys() != names.keys():
        missing, unknown = sorted(names.keys() - saved.keys()), sorted(saved.keys() - names.keys())
        raise CheckpointError(
            "it is of another model: " + "; ".join(_listed("it lacks", missing) + _listed("this one lacks", unknown))
        )
    for name, value in saved.items():
        _check_like(name, value, live[names[name]])
    own = OrderedDict((names[name], value) for name, value in saved.items())
    own._metadata = getattr(live, "_metadata", {})  # type: ignore[attr-defined]
    return own


def _check_masks(model: nn.Module, own: Mapping[str, Any], *, pruning: bool) -> None:
    """Require masks that ``verify`` will accept; where ``pruning``, also those on the way to their budgets."""
    for handle in sparse_weights(model):
        mask = own.get(handle.mask_fqn)
        if mask is None:
            continue
        attr, stand_in = handle.record.site.attr, nn.Module()
        stand_in.register_parameter(attr, nn.Parameter(own[handle.fqn], requires_grad=False))
        stand_in.register_buffer(attr + MASK_SUFFIX, mask)
        set_records(stand_in, {attr: replace(handle.record, dense_start=pruning or handle.record.dense_start)})
        try:
            verify(stand_in)
        except InvariantError as error:
            raise CheckpointError(f"the mask of {handle.fqn} there cannot be right: {error}") from error


def _is_mask(name: str, have: dict[str, dict[str, Any]]) -> bool:
    return any(name == weight + MASK_SUFFIX for weight in have)


def _listed(what: str, names: list[str]) -> list[str]:
    return [f"{what} {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"] if names else []


def _check_like(name: str, value: Any, like: Any) -> None:
    """Require that ``value`` can take the place of ``like``."""
    if is_sharded(like):
        raise CheckpointError(f"{name} is spread over processes here: use torch.distributed.checkpoint")
    if isinstance(value, Tensor) is not isinstance(like, Tensor):
        raise CheckpointError(f"{name} is a {type(value).__name__} there, but a {type(like).__name__} here")
    if isinstance(value, Tensor) and (value.shape, value.dtype) != (like.shape, like.dtype):
        raise CheckpointError(
            f"{name} is {value.dtype} {tuple(value.shape)} there, but {like.dtype} {tuple(like.shape)} here"
        )


def _check_optimizer(optimizer: Optimizer, saved: Any) -> None:
    """Require that a saved optimizer state is one that ``optimizer`` can continue from."""
    if saved is None:
        raise CheckpointError("it was saved without an optimizer: load it without, or create the optimizer anew")
    kind = type(optimizer).__name__
    if saved["class"] != kind:
        raise CheckpointError(f"it was saved with {saved['class']}, but the optimizer is {kind}")
    groups, state, live = saved["param_groups"], saved["state"], optimizer.param_groups
    parameters: dict[int, Tensor] = {}
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in live]:
        raise CheckpointError(
            f"{kind} has groups of {[len(group['params']) for group in live]} parameters, but the saved one of "
            f"{[len(group['params']) for group in groups]}"
        )
    for theirs, ours in zip(groups, live, strict=True):
        parameters.update(zip(theirs["params"], ours["params"], strict=True))
        own_options = {**optimizer.defaults, **{key: value for key, value in ours.items() if key != "params"}}
        for key, own in own_options.items():
            if key not in theirs and key in optimizer.defaults and key in ours:
                raise CheckpointError(f"its optimizer state is damaged: the option {key} of {kind} is missing")
            switch = key in _SWITCHES and isinstance(own, bool | None)
            odd = switch and not isinstance(theirs.get(key), bool | None)
            if key in theirs and (odd or not _alike(theirs[key], own, optimizer.defaults.get(key, own))):
                raise CheckpointError(f"the option {key} of {kind} is {theirs[key]!r} there, but {own!r} here")
    if len(parameters) != sum(len(group["params"]) for group in live) or not state.keys() <= parameters.keys():
        raise CheckpointError(f"the state of {kind} is not of its parameters")
    for index, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and not _fits(optimizer, key, value, parameters[index]):
                raise CheckpointError(
                    f"{key!r} of parameter {index} of {kind} has shape {tuple(value.shape)} there, the parameter "
                    f"{tuple(parameters[index].shape)}"
                )
        if not _is_count(optimizer, values.get("step", 0)):
            raise CheckpointError(
                f"'step' of parameter {index} of {kind} is {float(values['step']):g} there, which is no number of steps"
            )
    for theirs, ours in zip(groups, live, strict=True):
        _check_next_step(optimizer, theirs, ours, state)


def _check_next_step(
    optimizer: Optimizer, theirs: Mapping[str, Any], ours: Mapping[str, Any], state: Mapping[int, Mapping[Any, Any]]
) -> None:
    """Require that a group's next step finds what it needs: a new parameter with the options there shows what that is.

    Nothing is known of an optimizer whose steps cannot be tried out, with the options here neither.
    """
    kind = type(optimizer).__name__
    needed: dict[tuple[int, ...], tuple[Mapping[Any, Any], Mapping[Any, Any]]] = {}
    for index, parameter in zip(theirs["params"], ours["params"], strict=True):
        shape = small_shape(parameter.shape)
        if shape not in needed:
            try:
                needed[shape] = needs(optimizer, theirs, shape)
            except ProbeError as error:
                try:
                    needs(optimizer, ours, shape)
                except ProbeError:
                    return
                raise CheckpointError(f"{kind} does not step with the options there ({error})") from error
        begin, later = needed[shape]
        saved = state.get(index, {})
        for key, example in (later if saved else begin).items():
            if key not in saved:
                raise CheckpointError(f"{key!r} of parameter {index} of {kind}, which its next step needs, is missing")
            if isinstance(example, Tensor | int | float) and not isinstance(saved[key], Tensor | int | float):
                raise CheckpointError(
                    f"{key!r} of parameter {index} of {kind} is a {type(saved[key]).__name__} there, but must be a "
                    f"{type(example).__name__}"
                )


def _alike(theirs: Any, ours: Any, default: Any) -> bool:
    """Whether two options of an optimizer are values of one kind; where one may be None, its kind is not known."""
    if theirs is None:
        return ours is None or default is None
    if ours is None:
        return default is None or _alike(theirs, default, default)
    if isinstance(theirs, tuple | list) and isinstance(ours, tuple | list):
        defaults = default if isinstance(default, tuple | list) and len(default) == len(ours) else ours
        return len(theirs) == len(ours) and all(map(_alike, theirs, ours, defaults))
    return _kind(theirs) is _kind(ours)


def _kind(value: Any) -> type:
    if isinstance(value, bool):
        return bool
    number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return float if number else type(value)


def _is_count(optimizer: Optimizer, step: Any) -> bool:
    """Whether a parameter may have made so many steps; anything but a number is not asked here."""
    if not type(optimizer).__module__.startswith("torch.optim") or not isinstance(step, Tensor | int | float):
        return True
    number = float(step)
    return number >= 0 and number.is_integer()


def _fits(optimizer: Optimizer, key: object, value: Tensor, parameter: Tensor) -> bool:
    """Whether a state tensor can belong to a parameter; of optimizers that are not torch's nothing is known."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return True
    if key in _NUMBERS:
        return value.numel() == 1
    if isinstance(optimizer, torch.optim.Adafactor):  # factored: one row, one column
        return value.ndim == parameter.ndim and all(
            size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
        )
    return value.shape == parameter.shape
