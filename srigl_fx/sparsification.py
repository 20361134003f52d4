"""The first verb: ``sparsify`` a model, and ``finalize`` it back.

Owns the training pipeline of passes and the checks of the call's own arguments. Each step is a pass:
discover -> assign budgets, or follow a recipe -> draw masks -> insert masks; only the last one writes to the model.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, get_args

from torch import fx, nn

from srigl_fx.compatibility import noted
from srigl_fx.errors import RecipeError, RuleError, SparsifyError, StructureError
from srigl_fx.masks.distributions import DISTRIBUTIONS
from srigl_fx.masks.records import Structure, all_records
from srigl_fx.masks.structures import MaskInit
from srigl_fx.nn.effective import irreplaceable, prepare_plain
from srigl_fx.nn.permuted import fold_orders
from srigl_fx.nn.sparse_module import detach_masks, make_plain
from srigl_fx.passes.assign_budgets import AssignBudgets, Distribution
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.draw_masks import DrawMasks, WeightInit
from srigl_fx.passes.follow_recipe import FollowRecipe
from srigl_fx.passes.insert_masks import InsertMasks, restore_graph
from srigl_fx.recipes import REPLACEABLE, Recipe, asked_for
from srigl_fx.specs import LayerSpec, RuleKey, RuleSet, check_block_width, check_group_size, check_sparsity

Model = TypeVar("Model", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")

_BESIDE_A_RECIPE = {"recipe", "example_inputs"}  # what a recipe does not hold


def _exclusive(call: Callable[P, R]) -> Callable[P, R]:
    """``call``, which refuses a recipe together with arguments that the recipe holds, defaults that are given too."""

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("recipe") is not None and (besides := kwargs.keys() - _BESIDE_A_RECIPE - {"model"}):
            names = ", ".join(name for name in kwargs if name in besides)
            free = besides <= set(REPLACEABLE)
            change = ", ".join(f"{name}=..." for name in kwargs if name in besides)
            raise RecipeError(
                f"a recipe already says what {names} would: leave {'it' if len(besides) == 1 else 'them'} out, or "
                + (f"change the recipe by dataclasses.replace(recipe, {change})" if free else "the recipe")
            )
        return call(*args, **kwargs)

    return checked


@noted
@_exclusive
def sparsify(
    model: Model,
    *,
    sparsity: float = 0.9,
    distribution: Distribution = "erk",
    rules: Mapping[RuleKey, "float | LayerSpec | None"] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    structure: Structure = "constant_fan_in",
    group_size: int = 1,
    block_width: int = 1,
    mask_init: MaskInit = "magnitude",
    weight_init: WeightInit = "keep",
    example_inputs: Any = None,
    strict: bool = False,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> Model:
    """Make the weights of ``model`` sparse, in place, and return the same object.

    Every contraction weight that can be reached gets a bool mask buffer ``<weight name>_mask`` beside it and is zeroed
    off the mask; everything else keeps its name, its identity and its behaviour. No hooks are attached: train with
    :class:`srigl_fx.SRigL` or another trainer, which do. Print :func:`srigl_fx.summary` to see what became
    of each weight.

    Args:
        model: Any module. A ``torch.fx.GraphModule`` is rewritten too: each functional use of a masked weight becomes
            a ``call_module`` node, and :func:`srigl_fx.summary` names it.
        sparsity: Fraction of weights removed, in [0, 1), over all weights the distribution covers.
        distribution: How the sparsity is shared out over the layers: ``"erk"`` (RigL, Evci et al., 2020), ``"uniform"``
            (the global density is exact), ``"uniform_rigl"`` (first layer dense, all others exactly at the sparsity),
            or a mapping from weight or module names to densities (kept fractions).
        rules: ``{key: sparsity, LayerSpec or None}``; a key is the name of a module (and all below it) or parameter, a
            glob, or a module type; ``None`` leaves dense. An exact name wins over the first matching glob,
            that over a type.
        filter_fn: Asked first, with a module's name and the module: False leaves its weights dense.
        structure: ``"constant_fan_in"`` (every neuron keeps equally many weights), ``"unstructured"``, or ``"block"``
            (blocks of ``group_size`` neurons by ``block_width`` inputs are kept whole, anywhere in a layer).
        group_size: Neighbouring neurons that share their inputs, each with weights of its own: 1 (none do), 2, 4, 8, 16
            or 32. They are counted within a convolution's group, a projection of an attention, a gate or an expert; the
            last group there has what is left. With ``"unstructured"`` only the groups differ in their fan-in. All
            methods keep it so; an ablated neuron leaves its group as it is.
        block_width: With ``"block"``, neighbouring inputs of one block, in the weight's matrix view: 1, 2, 4, 8, 16 or
            32. A layer whose inputs are no multiple of it stays dense.
        mask_init: Keep the largest weights (``"magnitude"``), ``"random"`` ones, or all for now (``"dense"``), to be
            pruned gradually down to the budgets by :class:`srigl_fx.GMP`.
        weight_init: How kept weights start: ``"keep"`` their values, or drawn anew for the sparse fan-in by
            ``"kaiming"`` (std sqrt(2 / k)), ``"torch"`` (uniform within 1 / sqrt(k)) or ``"grad_flow_ref"``
            (std 2 / k).
        example_inputs: A tuple of inputs, or ``(args, kwargs)``; they show which weights feed the outputs.
        strict: Make it an error where the library does not understand how a weight is used, or would leave one dense
            because its fan-in would be 0.
        seed: Seeds masks and initialisation; each weight's draw depends on the seed and its name alone.
        recipe: A saved call (:func:`srigl_fx.recipe`), to be repeated: every weight gets what was decided for it there,
            and the masks are drawn in the same way. It stands for all arguments but ``example_inputs``.

    Raises:
        SparsifyError: If the sparsity is outside [0, 1), the model is sparse already or wrapped for several processes,
            there is nothing to sparsify, a rule names a layer too small for a fan-in of 1, or ``strict`` is violated.
        RuleError: If a rule is malformed or matches no weight.
        RecipeError: If the recipe does not fit the model (the message names the weights), or there are other arguments
            beside it.

    In each case the model is as it was.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        >>> sparsify(model, sparsity=0.75, distribution="uniform", rules={"2": None})[0]
        SparseLinear(in_features=64, out_features=32, bias=True, fan_in=16/64, active=32/32)
    """
    from srigl_fx.train import distributed

    if recipe is not None:
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                "recipe must be a srigl_fx.Recipe, as srigl_fx.recipe(model) and srigl_fx.Recipe.load(path) give it, "
                f"not {recipe!r:.80}"
            )
        mask_init, weight_init, seed = recipe.mask_init, recipe.weight_init, recipe.seed
    assign = budgets_asked(
        "sparsify",
        model,
        sparsity=sparsity,
        distribution=distribution,
        rules=rules,
        filter_fn=filter_fn,
        structure=structure,
        group_size=group_size,
        block_width=block_width,
        strict=strict,
    )
    _check_draw(mask_init, weight_init, seed)
    steps = (
        Discover(example_inputs),
        assign if recipe is None else FollowRecipe(decisions=recipe.weights),
        DrawMasks(mask_init=mask_init, weight_init=weight_init, seed=seed),
    )
    draft = run(steps, Draft(model)).subject
    # Not before: the passes have looked at every argument by now.
    draft.asked = (
        replace(recipe, weights=())
        if recipe is not None
        else request(assign, mask_init=mask_init, weight_init=weight_init, seed=int(seed))
    )
    run((InsertMasks(),), draft)
    distributed.ignore_masks(model)
    return model


@noted
def finalize(model: Model) -> Model:
    """Give the plain model back, in place: original classes and names, zeros written in, no masks, no hooks.

    A trainer that is still attached is detached. The outputs do not change. Layers that read their inputs in an order
    of their own get columns in that order instead; what an optimizer has for these columns is left where it was.

    Args:
        model: A model that was sparsified, or of which parts were, on any device; not sharded.

    Returns:
        The same object.

    Raises:
        InvariantError: The model is not what its masks say, as :func:`srigl_fx.verify` finds.
        SparsifyError: If nothing in ``model`` was sparsified, its weights are spread over processes, permutations of
            inputs are still being learned, or its own forward makes something else than zeros of zeros (weight
            standardisation does) and so cannot do without its masks.

    In each case the model is as it was.

    Example:
        >>> import torch
        >>> model = sparsify(torch.nn.Sequential(torch.nn.Linear(64, 32)), sparsity=0.5)
        >>> finalize(model)[0], sorted(model.state_dict())
        (Linear(in_features=64, out_features=32, bias=True), ['0.bias', '0.weight'])
    """
    from srigl_fx import masks
    from srigl_fx.train import detach_from, distributed

    owners = {id(owner): owner for _, owner, _ in all_records(model)}
    if not owners:
        raise SparsifyError(f"this {type(model).__name__} was not sparsified: there are no masks to take away")
    distributed.check_unwrapped(model, "finalize")
    masks.invariants.check_sound(model)
    _check_replaceable(model)
    if soft := masks.input_orders.soft_layers(model):
        raise SparsifyError(
            f"permutations of inputs are still being learned, in {', '.join(map(repr, list(soft)[:5]))}: call "
            ".harden() on the LearnedPermutations first, and evaluate the model again"
        )
    detach_from(model)
    masks.apply(model)
    fold_orders(model)
    for module in model.modules():
        distributed.forget_masks(module)
    for owner in owners.values():
        prepare_plain(owner)
        detach_masks(owner)
    masks.completeness.note_masked(model, ())
    for module in model.modules():
        make_plain(module)
        if isinstance(module, fx.GraphModule):
            restore_graph(module)
    return model


def _check_replaceable(model: nn.Module) -> None:
    """Require that the outputs stay what they are when the masks are gone."""
    names = [
        f"{name}.{path}" if name else path for name, module in model.named_modules() for path in irreplaceable(module)
    ]
    if names:
        raise SparsifyError(
            f"finalize would change the outputs: the model transforms {', '.join(map(repr, names[:5]))} before use, "
            "and makes other values than zeros of pruned weights. Keep the masks: the model trains, lowers, exports "
            "and saves its state_dict as it is"
        )


def budgets_asked(
    verb: str,
    model: object,
    *,
    sparsity: float,
    distribution: Distribution,
    rules: Mapping[RuleKey, "float | LayerSpec | None"] | None,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    structure: Structure,
    group_size: int,
    block_width: int,
    strict: bool,
) -> AssignBudgets:
    """The budget pass of a call of ``sparsify``, or of another verb with these arguments, which are checked.

    Raises:
        SparsifyError: An argument is out of range, or the model is sparse already or wrapped for several processes.
        RuleError: A rule is malformed.
        StructureError: There is no such structure.

    Example:
        >>> asked = dict(sparsity=0.5, distribution="erk", rules=None, filter_fn=None, structure="unstructured")
        >>> budgets_asked("sparsify", nn.Linear(3, 2), **asked, group_size=1, block_width=1, strict=False).sparsity
        0.5
    """
    from srigl_fx.train import distributed

    if not isinstance(model, nn.Module):
        raise SparsifyError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}")
    check_sparsity(sparsity, verb)
    done = [fqn for fqn, _, record in all_records(model) if record.sparse]
    if done:
        raise SparsifyError(
            f"the model is sparse already ({done[0]!r} has a mask); call finalize(model) first to start over"
        )
    if not isinstance(distribution, Mapping) and not (isinstance(distribution, str) and distribution in DISTRIBUTIONS):
        raise SparsifyError(f"distribution must be one of {sorted(DISTRIBUTIONS)} or a mapping, got {distribution!r}")
    if structure not in get_args(Structure):
        raise StructureError(f"structure must be one of {get_args(Structure)}, got {structure!r}")
    check_group_size(group_size, verb)
    check_block_width(block_width, verb)
    distributed.check_unwrapped(model, verb)
    if filter_fn is not None and not callable(filter_fn):
        raise SparsifyError(f"filter_fn must be a function of a module's name and the module, got {filter_fn!r}")
    ruleset = RuleSet(rules)
    if block_width > 1 and "block" not in {structure, *(spec.structure for spec in ruleset.specs())}:
        raise RuleError(
            f"{verb}: block_width={block_width} is for blocks, but the structure is {structure!r}, and no rule asks "
            'for another: add structure="block", or leave block_width out'
        )
    return AssignBudgets(
        sparsity=float(sparsity),
        distribution=distribution,
        rules=ruleset,
        filter_fn=filter_fn,
        structure=structure,
        group_size=group_size,
        block_width=block_width,
        strict=strict,
    )


def request(assign: AssignBudgets, *, mask_init: MaskInit, weight_init: WeightInit, seed: int) -> Recipe:
    """What a call asks for, as its recipe keeps it, before anything is decided.

    Example:
        >>> asked = dict(sparsity=0.5, distribution="erk", rules=None, filter_fn=None, structure="unstructured")
        >>> assign = budgets_asked("sparsify", nn.Linear(3, 2), **asked, group_size=1, block_width=1, strict=False)
        >>> request(assign, mask_init="random", weight_init="keep", seed=3).seed
        3
    """
    return asked_for(
        sparsity=assign.sparsity,
        distribution=assign.distribution,
        rules=assign.rules,
        structure=assign.structure,
        group_size=assign.group_size,
        block_width=assign.block_width,
        mask_init=mask_init,
        weight_init=weight_init,
        strict=bool(assign.strict),
        seed=seed,
        filtered=assign.filter_fn is not None,
    )


def _check_draw(mask_init: object, weight_init: object, seed: object) -> None:
    for name, value, choices in (
        ("mask_init", mask_init, get_args(MaskInit)),
        ("weight_init", weight_init, get_args(WeightInit)),
    ):
        if value not in choices:
            raise SparsifyError(f"{name} must be one of {choices}, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SparsifyError(f"seed must be a whole number, got {seed!r}")
