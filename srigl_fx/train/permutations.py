"""A permutation of each layer's inputs, learned beside its weights: y = S P x.

Owns :class:`LearnedPermutations`: which layers have one, when a matrix is brought near a permutation, and when it
becomes one. It must not know how masks change, nor the rules for a single matrix
(:mod:`srigl_fx.train.soft_permutations`).
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.input_orders import MATRIX, matrix_of, order_of
from srigl_fx.masks.records import SparseWeight, plain, sparse_weights
from srigl_fx.masks.shards import is_sharded
from srigl_fx.nn.permuted import drop, settle, soften, why_not
from srigl_fx.train.distributed import processes_of
from srigl_fx.train.soft_permutations import assignment, normalise, normalised_penalty, penalty
from srigl_fx.train.stepping import StepHooks, unwrap

_log = logging.getLogger(__name__)

STATE_VERSION = 1
# Layer -> who learns its permutation. A copy of the layer is another key: nobody does.
_ATTACHED: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[LearnedPermutations]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Hardened:
    """How a layer's matrix became a permutation.

    Attributes:
        step: Optimizer steps that the run had made.
        penalty: Its normalised penalty before: 0 of a permutation, 1 where all entries are equal.
        kept: The mean of the entries that were assigned: 1 of a permutation.
        repeated: Inputs that the largest entries of the rows would have left out.
    """

    step: int
    penalty: float
    kept: float
    repeated: int


class LearnedPermutations:
    """Learns a permutation of the inputs of masked layers, beside the trainer that changes their masks.

    Each layer reads mixtures of its inputs by a matrix that trains with the weights and is brought near a permutation
    by :meth:`penalty`, which you add to the loss. After each step of the optimizer its negative entries become zero,
    and its columns, then its rows are divided by their sums. Once its normalised penalty is below ``harden_below`` the
    layer reads a permutation of its inputs from then on, which ``lower`` makes part of the weight's indices.

    Make it after the optimizer and before a scheduler: it adds a group of parameters to the optimizer. Of a
    convolution, the channels are permuted.

    Attributes:
        weight: That of the penalty in the loss.
        harden_below: The normalised penalty below which a matrix becomes a permutation.
        skipped: The masked layers without a permutation, by name, and why; those that ``layers`` leaves out are not
            listed.
        hardened: How the matrices that are permutations by now became so, by the layer's name.

    Source: PA-DST (arXiv 2510.14812); the penalty is that of AutoShuffleNet (Lyu et al., 2019). Rows are assigned to
        columns by the best sum, where the paper takes each row's largest entry.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), sparsity=0.75)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> trainer = sx.SET(model, optimizer, total_steps=1000)
        >>> permutations = LearnedPermutations(model, optimizer)
        >>> loss = model(torch.ones(4, 32)).square().mean() + permutations.penalty()
        >>> loss.backward()
        >>> optimizer.step()
        >>> {name: 0.22 < share < 1 for name, share in permutations.penalties().items()}
        {'0': True, '2': True}
        >>> sorted(permutations.harden()), permutations.penalties(), float(permutations.penalty())
        (['0', '2'], {}, 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        layers: Iterable[str] | None = None,
        penalty: float = 1e-3,
        harden_below: float = 0.22,
        lr: float | None = None,
        seed: int = 0,
    ) -> None:
        """Give the layers their matrices, and the optimizer these as a group without weight decay.

        Args:
            model: A sparsified model. Layers whose permutations are decided, or learned already, go on with these.
            optimizer: Trains it.
            layers: Names and globs of layers (``*`` crosses dots; a module covers all below it); by default all linear
                layers and ungrouped convolutions with a mask that are called by their own forward.
            penalty: The weight of the penalty in the loss.
            harden_below: The share of the largest penalty below which a matrix becomes a permutation.
            lr: The matrices' learning rate; by default the optimizer's own.
            seed: Of the first matrices, whose entries are uniform in [0, 1), then normalised.

        Raises:
            TrainerError: Nothing is masked, ``layers`` matches nothing or names a layer that cannot have a permutation,
                an argument is no such number, permutations of this model are being learned already, or several
                processes train it; model and optimizer are as they were.
        """
        _check_number("penalty", penalty, 0.0, math.inf)
        _check_number("harden_below", harden_below, 0.0, 1.0)
        if lr is not None:
            _check_number("lr", lr, 0.0, math.inf)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TrainerError(f"seed is {seed!r}, but must be a whole number")
        if not isinstance(model, nn.Module) or not (weights := sparse_weights(model)):
            raise TrainerError(
                f"{type(model).__name__} has no mask-managed weight: call srigl_fx.sparsify(model) first"
            )
        followed = unwrap(optimizer)
        if processes_of(model).group is not None or any(is_sharded(handle.weight) for handle in weights):
            raise TrainerError(
                "permutations are learned by a single process: learn them there, call .harden(), and load that model's "
                "state_dict into the one that several processes train; permutations that are decided train with it"
            )
        chosen, self.skipped = _layers(model, weights, layers)
        if not chosen:
            raise TrainerError(
                "no layer can have a permutation: "
                + "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:5])
            )
        if taken := [name for name, module in chosen.items() if _learner_of(module) is not None]:
            raise TrainerError(
                f"permutations of {taken[0]} are being learned already: call .detach() on that LearnedPermutations"
            )
        self.weight, self.harden_below = float(penalty), float(harden_below)
        self.hardened: dict[str, Hardened] = {}
        self._steps = 0
        self._layers = chosen
        self._optimizer = followed
        self._given = {name for name, module in chosen.items() if order_of(module) is not None}
        self._soften(lr, seed)
        for module in chosen.values():
            _ATTACHED[module] = weakref.ref(self)
        self._hooks = StepHooks(followed, lambda *_: None, _calling(self))
        self._hooks.register()

    @property
    def steps(self) -> int:
        """Optimizer steps since the start of the run."""
        return self._steps

    @property
    def soft(self) -> list[str]:
        """The names of the layers whose permutations are still learned."""
        return [name for name, module in self._layers.items() if matrix_of(module) is not None]

    def penalty(self) -> Tensor:
        """What to add to the loss: the sum of all matrices' penalties times their weight, 0 once all are permutations.

        Where gradients of several batches are summed for a step, it is divided with the loss.
        """
        matrices = [matrix for name in self.soft if (matrix := matrix_of(self._layers[name])) is not None]
        if not matrices:
            weight = next(iter(self._layers.values())).get_parameter("weight")
            return torch.zeros((), device=weight.device)
        return self.weight * torch.stack([penalty(matrix.float()) for matrix in matrices]).sum()

    def penalties(self) -> dict[str, float]:
        """The normalised penalty of each matrix that is still learned: 1 where all entries are equal, 0 at the end."""
        found = {name: matrix_of(self._layers[name]) for name in self.soft}
        return {name: normalised_penalty(matrix.float()) for name, matrix in found.items() if matrix is not None}

    @torch.no_grad()
    def harden(self, names: Iterable[str] | None = None) -> dict[str, Hardened]:
        """Make permutations of matrices whatever their penalty is, at the end of a training, say.

        The further a matrix is from a permutation, the more the model's outputs change: evaluate it again.

        Args:
            names: The layers; by default all whose permutations are still learned.

        Returns:
            What became of each, as in :attr:`hardened`.

        Raises:
            TrainerError: One of the names is not that of such a layer, or a matrix is not finite; nothing is changed.
        """
        soft = self.soft
        wanted = soft if names is None else list(names)
        if unknown := [name for name in wanted if name not in soft]:
            raise TrainerError(f"no permutation of {unknown[0]!r} is being learned; those of {', '.join(soft)} are")
        found = {name: matrix_of(self._layers[name]) for name in wanted}
        if broken := [name for name, matrix in found.items() if matrix is None or not bool(matrix.isfinite().all())]:
            raise TrainerError(
                f"the permutation of {broken[0]} is not finite any more: resume from an earlier checkpoint, at a lower "
                "learning rate"
            )
        return {name: self._harden(name, matrix) for name, matrix in found.items() if matrix is not None}

    def detach(self) -> None:
        """Follow the optimizer no more: matrices stay as they are, and no one brings them near a permutation."""
        self._hooks.remove()
        for module in self._layers.values():
            if _learner_of(module) is self:
                del _ATTACHED[module]

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the state of model and optimizer: plain values."""
        return {
            "version": STATE_VERSION,
            "steps": self._steps,
            "hardened": {name: asdict(how) for name, how in self.hardened.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, once model and optimizer have loaded theirs.

        Raises:
            TrainerError: The state is damaged, or of another version or model; nothing is changed then.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise TrainerError(f"the state is of version {state['version']!r}, this release reads {STATE_VERSION}")
            steps, hardened = state["steps"], {name: Hardened(**how) for name, how in state["hardened"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise TrainerError(f"the state is damaged ({error!r}): load that of another checkpoint") from error
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise TrainerError(f"the state is damaged: it counts {steps!r} steps")
        if unlike := [
            name
            for name in {**self._layers, **hardened}
            if (name in hardened) != (name in self._layers and order_of(self._layers[name]) is not None)
            and name not in self._given
        ]:
            raise TrainerError(
                f"the permutation of {unlike[0]} is decided in one of state and model, and not in the other: load the "
                "state_dict of the model from the same moment first"
            )
        self._steps, self.hardened = steps, hardened

    def __repr__(self) -> str:
        return f"LearnedPermutations(soft={len(self.soft)}, hardened={len(self._layers) - len(self.soft)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "LearnedPermutations":
        """A copy would follow the same optimizer's steps."""
        raise TrainerError(
            "what learns permutations cannot be copied: copy the model, and make a new one for the copy and its "
            "own optimizer"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TrainerError("what learns permutations cannot be pickled: save its state_dict()")

    def _soften(self, lr: float | None, seed: int) -> None:
        """Give the layers that need one a matrix, and the optimizer those that it does not hold."""
        generator = torch.Generator().manual_seed(seed)
        made: list[str] = []
        matrices: dict[str, nn.Parameter] = {}
        for name, module in self._layers.items():
            matrix = matrix_of(module)
            if matrix is None and name not in self._given:
                weight = module.get_parameter("weight")
                drawn = normalise(torch.rand(weight.shape[1], weight.shape[1], generator=generator))
                matrix = soften(module, drawn.to(weight.device, weight.dtype))
                made.append(name)
            if matrix is not None:
                matrices[name] = matrix
        held = _held(self._optimizer)
        new = {name: matrix for name, matrix in matrices.items() if id(matrix) not in held}
        if not new:
            return
        group: dict[str, Any] = {"params": list(new.values()), "weight_decay": 0.0}
        if any("param_names" in other for other in self._optimizer.param_groups):
            group["params"] = [(f"{name}.{MATRIX}" if name else MATRIX, matrix) for name, matrix in new.items()]
        if lr is not None:
            group["lr"] = float(lr)
        try:
            self._optimizer.add_param_group(group)
        except Exception as error:
            for name in made:
                drop(self._layers[name])
            raise TrainerError(
                f"{type(self._optimizer).__name__} takes no group of parameters for the permutations ({error}): use an "
                "optimizer whose add_param_group works"
            ) from error

    @torch.no_grad()
    def _after_step(self) -> None:
        self._steps += 1
        held = _held(self._optimizer)
        for name in self.soft:
            matrix = matrix_of(self._layers[name])
            assert matrix is not None
            if id(matrix) not in held:
                raise TrainerError(
                    f"the optimizer does not hold {name}.{MATRIX}, which something has replaced: load state_dicts "
                    f"without assign=True, or make optimizer and LearnedPermutations anew"
                )
            matrix.copy_(normalise(matrix))
            share = normalised_penalty(matrix.float())
            if share < self.harden_below:
                how = self._harden(name, matrix)
                _log.info("step %d: the permutation of %s is decided (penalty %.3f)", how.step, name, share)

    def _harden(self, name: str, matrix: nn.Parameter) -> Hardened:
        """Make a permutation of one matrix, which the optimizer forgets but for its place."""
        module, share = self._layers[name], normalised_penalty(matrix.float())
        order = assignment(matrix)
        found = len(set(matrix.argmax(1).tolist()))
        kept = float(matrix.gather(1, order[:, None]).float().mean())
        how = Hardened(step=self._steps, penalty=share, kept=kept, repeated=len(order) - found)
        settle(module, order)
        for each in self._hooks.optimizers:
            each.state.pop(matrix, None)
        self.hardened[name] = how
        return how


def _calling(permutations: LearnedPermutations) -> Callable[..., None]:
    """The hook on steps, without tying the life of ``permutations`` to the optimizer's."""
    reference = weakref.ref(permutations)

    def after(*_: Any) -> None:
        if (alive := reference()) is not None:
            alive._after_step()

    return after


def _learner_of(module: nn.Module) -> LearnedPermutations | None:
    reference = _ATTACHED.get(module)
    return None if reference is None else reference()


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value == math.inf:
        bound = f"in [{least:g}, {most:g}]" if most < math.inf else "of at least 0, and finite"
        raise TrainerError(f"{name} is {value!r}, but must be a number {bound}")


def _layers(
    model: nn.Module, weights: Iterable[SparseWeight], wanted: Iterable[str] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that get a permutation, by name, and why the other masked ones do not.

    Raises:
        TrainerError: A wanted name matches no masked layer, or is that of one that cannot have a permutation.
    """
    if isinstance(wanted, str) or (wanted is not None and not isinstance(wanted, Iterable)):
        raise TrainerError(f'layers is {wanted!r}, but must be a list of names and globs: ["blocks.*.mlp"]')
    patterns = None if wanted is None else list(wanted)
    inside = {
        id(part.out_proj): "nn.MultiheadAttention reads its weight without calling it"
        for part in model.modules()
        if isinstance(part, nn.MultiheadAttention)
    }
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    matched: set[str] = set()
    for handle in weights:
        name = plain(handle.fqn).rpartition(".")[0]
        fits = [p for p in patterns or [] if fnmatchcase(name, p) or p == "" or name.startswith(f"{p}.")]
        matched.update(fits)
        if patterns is not None and not fits:
            continue
        reason = inside.get(id(handle.owner), "") or why_not(handle.owner)
        if not reason and handle.record.site.aliases:
            reason = f"its weight is also {handle.record.site.aliases[0]}"
        if not reason:
            chosen[name] = handle.owner
        elif name in fits:
            raise TrainerError(f"{name} cannot have a permutation: {reason}")
        else:
            skipped[name] = reason
    if unknown := [p for p in patterns or [] if p not in matched]:
        raise TrainerError(f"layers: {unknown[0]!r} matches no masked layer")
    return chosen, skipped
