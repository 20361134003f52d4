"""Masks and recipe in a folder that ``save_pretrained`` wrote, and a sparse model from such a folder.

Owns one file beside the weights, ``srigl_fx_masks.safetensors``, and when it belongs to them. It must not know how
transformers lays out a folder: that stays readable without this library, as a dense model.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx import masks
from srigl_fx.errors import CheckpointError, InvariantError, RecipeError, SriglError
from srigl_fx.integrations.attachment import extra
from srigl_fx.masks.records import plain, sparse_weights
from srigl_fx.masks.shards import is_sharded
from srigl_fx.recipe_parts import from_plain, to_plain
from srigl_fx.recipes import Recipe, recipes_of
from srigl_fx.restoration import restore
from srigl_fx.train import distributed
from srigl_fx.train.checkpoint_file import read, write

with extra("transformers", "transformers"):
    from transformers.utils.hub import cached_file

MASKS_FILE = "srigl_fx_masks.safetensors"
_VERSION = 1
_SPREADING = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
_WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save a sparse model of transformers with its masks and its recipe, for :func:`from_pretrained`.

    The folder is one that ``model.save_pretrained(folder, **options)`` writes, and ``AutoModel.from_pretrained`` reads
    the pruned weights from it as a dense model. Masks and recipe lie beside them in ``srigl_fx_masks.safetensors``.

    Args:
        model: A model of transformers that was sparsified, or of which a part was.
        folder: The folder, which is made where there is none.
        **options: Arguments of the model's own ``save_pretrained``, such as ``max_shard_size``.

    Of a model that ``fully_shard`` has spread over processes, call it on all of them: the weights are gathered, and the
    first process writes the folder.

    Raises:
        CheckpointError: The model has no masks or no ``save_pretrained``, is in ``FullyShardedDataParallel``, or
            ``push_to_hub`` is asked for; or the folder cannot be written.
        InvariantError: The model is not what its masks say.
        TrainerError: Saving failed on another process, whose error says why.

    Example:
        >>> import tempfile, srigl_fx as sx
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = sx.sparsify(BertModel(BertConfig(vocab_size=40, **sizes)), sparsity=0.8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(model, folder)
        ...     again = from_pretrained(AutoModel, folder)
        >>> sx.recipe(again) == sx.recipe(model)
        True
    """
    if distributed.is_flattened(model):
        raise CheckpointError(
            "FullyShardedDataParallel flattens the weights that masks belong to: spread the model by fully_shard"
        )
    saver = getattr(model, "save_pretrained", None)
    if not callable(saver):
        raise CheckpointError(
            f"{type(model).__name__} has no save_pretrained: give the model of transformers itself, without wrappers"
        )
    model = getattr(saver, "__self__", model)  # the model inside torch.compile's module, which lends its methods
    if not sparse_weights(model):
        raise CheckpointError(f"this {type(model).__name__} has no masks: its own save_pretrained saves all of it")
    if options.get("push_to_hub"):
        raise CheckpointError(
            "push_to_hub would upload the folder before the masks are in it: save without it, then upload the folder "
            "(huggingface_hub.upload_folder)"
        )
    given: Mapping[str, Any] | None = options.pop("state_dict", None)
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        _save(model, saver, Path(folder), model.state_dict() if given is None else given, options)
        return
    processes = distributed.processes_of(model)
    first = processes.first
    state = distributed.gathered(model.state_dict(keep_vars=True) if given is None else given, keep=first)
    failure: Exception | None = None
    try:
        masks.verify(model)
        if first:
            _save(model, saver, Path(folder), state, options)
    except Exception as error:  # of this process; the others must not wait for it
        failure = error
    processes.fail_together(failure, "save_pretrained")


def _save(
    model: nn.Module, saver: Callable[..., Any], folder: Path, state: Mapping[str, Any], options: dict[str, Any]
) -> None:
    """Write the folder of a model whose whole weights are in ``state``."""
    masks.verify(model)
    contents = contents_of(model)
    if not contents["recipes"]:
        raise CheckpointError("the model was unpickled from a release that kept no recipes: sparsify it anew")
    dense = masks.strip(state)  # refuses orders of inputs, before anything is written
    target = folder / MASKS_FILE
    main = options.get("is_main_process", True)
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # or a crash could leave it beside other weights than its own
        except OSError as error:
            where = error.filename or folder
            raise CheckpointError(
                f"{where} cannot be written ({error.strerror or error}): give a folder, or the name of a new one"
            ) from error
    saver(folder, state_dict=dense, **options)
    if main:
        write(target, contents)


def from_pretrained(
    cls: Any,
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> Any:
    """Load a model that :func:`save_pretrained` saved, sparse as it was: the same weights, the same masks.

    It can be trained on, lowered and exported as the saved one. Checkpoint folders of the transformers ``Trainer``
    that :class:`~srigl_fx.integrations.transformers.SRigLCallback` wrote to are read too.

    Args:
        cls: The model's class or an auto class, ``AutoModelForCausalLM`` say.
        folder: The folder, or the name of a model on the hub.
        recipe: The recipe, for a folder that the model's own ``save_pretrained`` wrote: masks are among the weights
            there, but nothing says what they were decided for.
        example_inputs: As for :func:`srigl_fx.sparsify`; needed where that needed them.
        **options: Arguments of ``cls.from_pretrained``, such as ``dtype``.

    Returns:
        The model, in eval mode as transformers gives it.

    Raises:
        CheckpointError: There are no masks in the folder, or they are damaged or not of these weights; or the recipe
            is not that of the model that was saved. There is no such folder or model, or ``cls`` loads none. Or the
            options ask for a model that is spread over processes.
    """
    if not isinstance(recipe, Recipe | None):
        raise CheckpointError(f"recipe must be a Recipe, as srigl_fx.Recipe.load(path) gives it, not {recipe!r:.80}")
    if options.get("output_loading_info"):
        raise CheckpointError("output_loading_info is not supported here: call the class's own from_pretrained for it")
    if spread := [name for name in _SPREADING if options.get(name) is not None]:
        raise CheckpointError(
            f"{', '.join(spread)} would spread the weights over processes before the masks are on them: leave "
            f"{'it' if len(spread) == 1 else 'them'} out, and call fully_shard(model) on what from_pretrained returns"
        )
    if not callable(getattr(cls, "from_pretrained", None)):
        raise CheckpointError(
            f"{getattr(cls, '__name__', cls)} has no from_pretrained: give the model's class in transformers, or an "
            "auto class, AutoModelForCausalLM say"
        )
    where = {name: options[name] for name in _WHERE if options.get(name) is not None}
    try:
        path = cached_file(folder, MASKS_FILE, _raise_exceptions_for_missing_entries=False, **where)
    except OSError as error:  # of a folder that exists, it asks no hub
        raise CheckpointError(
            f"there is no folder {folder}, and no model of that name on the hub can be read ({error}): give the folder "
            "that save_pretrained wrote"
        ) from error
    if path is None:
        found, saved, pruning = _among_weights(folder, recipe, where)
    else:
        found, saved, pruning = _beside_weights(path)
        if recipe is not None:
            raise CheckpointError(f"{path} holds the recipe already: leave recipe= out")
    model = cls.from_pretrained(folder, **options)
    try:
        for part, one in sorted(found.items(), key=lambda item: len(item[0])):  # a whole before the parts inside it
            prefix = f"{part}." if part else ""
            inside = tuple(f"{other}." for other in found if other != part and other.startswith(prefix))
            own = {
                name.removeprefix(prefix): mask
                for name, mask in saved.items()
                if name.startswith(prefix) and not name.startswith(inside)
            }
            restore(model.get_submodule(part), one, own, pruning=pruning, example_inputs=example_inputs)
    except (SriglError, AttributeError) as error:
        if recipe is not None:
            # What is advised where masks break an invariant is for models that train.
            broken = isinstance(error.__cause__, InvariantError)
            differs = "the masks there keep other numbers of weights than it decided" if broken else error
            raise CheckpointError(
                f"the recipe is not that of the model that was saved in {folder}: {differs}. Pass recipe="
                "srigl_fx.recipe(model) of that very model"
            ) from error
        raise CheckpointError(
            f"the masks in {path or folder} are not of the {type(model).__name__} that {folder} holds: {error}. Load "
            "the class that was saved, which config.json there names; save weights and masks at once, with "
            "srigl_fx.integrations.transformers.save_pretrained"
        ) from error
    masks.verify(model)
    return model


def contents_of(model: nn.Module) -> dict[str, Any]:
    """What the file holds for a model.

    Example:
        >>> contents_of(nn.Linear(3, 2))["masks"]
        {}
    """
    handles = sparse_weights(model)
    return {
        "version": _VERSION,
        "recipes": to_plain(recipes_of(model)),
        "pruning": any(handle.record.dense_start for handle in handles),
        "masks": {plain(handle.fqn): handle.mask for handle in handles},
    }


def _beside_weights(path: str) -> tuple[dict[str, Recipe], dict[str, Tensor], bool]:
    """Recipes, masks and whether they are being pruned, from the file; everything in it is checked."""
    contents = read(path)
    version = contents.get("version")
    if type(version) is not int or version != _VERSION:
        raise CheckpointError(
            f"{path} is of version {version!r:.40}, but this srigl_fx reads {_VERSION}: update it"
            if type(version) is int
            else f"{path} holds no masks of a model: it is another file of srigl_fx"
        )
    saved, pruning = contents.get("masks"), contents.get("pruning")
    if (
        not isinstance(saved, dict)
        or not isinstance(pruning, bool)
        or not all(isinstance(name, str) and isinstance(mask, Tensor) for name, mask in saved.items())
    ):
        raise CheckpointError(f"{path} is damaged: it must hold masks by the names of weights; save the model again")
    try:
        found = from_plain(contents.get("recipes"))
    except RecipeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not found:
        raise CheckpointError(f"{path} holds no recipe: save the model again")
    return found, saved, pruning


def _among_weights(
    folder: str | os.PathLike[str], recipe: Recipe | None, where: Mapping[str, Any]
) -> tuple[dict[str, Recipe], dict[str, Tensor], bool]:
    """The masks that the model's own ``save_pretrained`` put among the weights of a folder."""
    saved: dict[str, Tensor] = {}
    for file in sorted(Path(folder, where.get("subfolder", "")).glob("model*.safetensors")):
        saved |= _masks_in(file)
    if not saved:
        raise CheckpointError(
            f"{folder} holds no {MASKS_FILE}, and no masks among its weights: it is of a dense model, or incomplete. "
            "srigl_fx.integrations.transformers.save_pretrained writes both; cls.from_pretrained loads a dense model"
        )
    if recipe is None:
        raise CheckpointError(
            f"{folder} holds masks among its weights, but no {MASKS_FILE} with the recipe: the model's own "
            "save_pretrained wrote it. Pass recipe= (srigl_fx.recipe(model) of the model that was saved), and save "
            "with srigl_fx.integrations.transformers.save_pretrained"
        )
    return {"": recipe}, saved, recipe.mask_init == "dense"


def _masks_in(file: Path) -> dict[str, Tensor]:
    """The bool tensors ``<weight>_mask`` of a file, by the names of weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith("_mask")]  # noqa: SIM118 - it is no dict
            tensors = {name.removesuffix("_mask"): opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): save the model again") from error
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.bool and tensor.dim() >= 2}
