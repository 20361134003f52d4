"""What inference and training cost, in floating-point operations (FLOPs).

Owns the counting convention: pure functions of layer shapes and densities, and the measurement of layer shapes on a
model. It must not know trainers or how a mask changes.

Multiplications and additions count one each. An output element that sums L products takes L multiplications and L - 1
additions, one more addition for a bias and, after a convolution, one multiplication for the activation; both are
counted whether or not they are there. Normalisation, pooling and residual additions are not counted.
Source: MicroNet Challenge (NeurIPS 2019), as used by RigL (Evci et al., 2020), appendix H, and SRigL (Lasby et al.,
ICLR 2024).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srigl_fx.errors import TrainerError
from srigl_fx.masks import named_masks
from srigl_fx.nn.model_state import copies, restored
from srigl_fx.train.checks import check_count, check_share
from srigl_fx.train.schedules import cubic_sparsity, end_step, last_update_step

Method = Literal["dense", "static", "set", "rigl", "srigl", "snfs", "gmp"]
Formula = Literal["rigl_paper", "srigl_table"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one weight does to one sample.

    Attributes:
        products: Multiplications of the dense dot products.
        outputs: Output elements that they are summed to.
        bias: Whether to count an addition for each output element.
        activation: Whether to count a multiplication for each output element.
    """

    products: int
    outputs: int
    bias: bool = True
    activation: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], positions: int = 1) -> "LayerCost":
        """The cost of a weight (out, in) or of a convolution kernel (out, in / groups, kernel...).

        Args:
            shape: The weight's shape; one of more than two dimensions is followed by an activation.
            positions: Output positions of a sample: the pixels of the output image, or the tokens.

        Raises:
            TrainerError: The shape has less than two dimensions, or a size is below 1.

        Example:
            >>> LayerCost.of((64, 3, 7, 7), positions=112 * 112).products
            118013952
        """
        if len(shape) < 2 or min(*shape, positions) < 1:
            raise TrainerError(
                f"a weight of shape {tuple(shape)} at {positions} positions has no cost: give (out, in, kernel...) and "
                "at least one position"
            )
        products = math.prod(shape) * positions
        return cls(products=products, outputs=shape[0] * positions, activation=len(shape) > 2)

    def flops(self, density: float = 1.0) -> float:
        """FLOPs of one sample where only the share ``density`` of the weights is there.

        Example:
            >>> LayerCost.of((10, 100)).flops(), LayerCost.of((10, 100)).flops(0.1)
            (2000.0, 200.0)
        """
        check_share("density", density)
        return 2.0 * self.products * density + self.outputs * (self.bias + self.activation - 1)


def inference_flops(layers: Mapping[str, LayerCost], densities: Mapping[str, float] | None = None) -> float:
    """FLOPs of the forward pass of one sample.

    Args:
        layers: The cost of each layer by name.
        densities: Share of the weights each keeps: of :mod:`srigl_fx.masks.distributions`, as papers count it, or of
            :func:`measured_densities`. A layer that is not named is dense.

    Raises:
        TrainerError: A density is outside [0, 1], or names no layer.

    Example:
        >>> from srigl_fx.masks.distributions import uniform_rigl
        >>> shapes = {"conv": (8, 4, 3, 3), "fc": (10, 128)}
        >>> layers = {"conv": LayerCost.of(shapes["conv"], positions=16), "fc": LayerCost.of(shapes["fc"])}
        >>> inference_flops(layers), inference_flops(layers, uniform_rigl(shapes, sparsity=0.5))
        (11904.0, 10624.0)
    """
    densities = densities or {}
    if unknown := sorted(densities.keys() - layers.keys()):
        raise TrainerError(f"densities of layers whose cost is unknown: {', '.join(unknown)}")
    return sum(layer.flops(densities.get(name, 1.0)) for name, layer in layers.items())


def training_flops(
    method: Method,
    *,
    dense: float,
    sparse: float,
    update_every: int = 100,
    formula: Formula = "rigl_paper",
    total_steps: int | None = None,
    stop_at: float = 0.75,
) -> float:
    """FLOPs of a training step, for each sample, averaged over a run; times samples and epochs, those of the run.

    With f_S and f_D for one sparse and one dense forward pass, and T steps from one update to the next:

    ===================  ================================================================================
    ``dense``            3 f_D: a forward pass, and twice as much to go back
    ``static``, ``set``  3 f_S
    ``rigl``, ``srigl``  (T 3 f_S + 2 f_S + f_D) / (T + 1): on updates all weights get a gradient
    ``snfs``             2 f_S + f_D: on all steps all weights get a gradient
    ``gmp``              3 f at the sparsity of each step, which falls from f_D to f_S along the cubic schedule
    ===================  ================================================================================

    Args:
        method: One of the table.
        dense: f_D, of :func:`inference_flops`.
        sparse: f_S.
        update_every: T, for "rigl", "srigl" and "gmp".
        formula: "rigl_paper" as above; "srigl_table" with 4 f_S in place of 2 f_S, which is what the published FLOPs
            of SRigL were calculated with.
        total_steps: Steps of the run, needed for "gmp" alone.
        stop_at: Share of the steps after which the masks stay, for "gmp" alone.

    Raises:
        TrainerError: An argument is out of range, or the method or formula is unknown.

    Source: RigL (Evci et al., 2020), appendix H; SRigL (Lasby et al., ICLR 2024).

    Example:
        >>> training_flops("dense", dense=100, sparse=20), training_flops("static", dense=100, sparse=20)
        (300.0, 60.0)
        >>> [round(training_flops("srigl", dense=100, sparse=20, formula=formula), 2)
        ...  for formula in ("rigl_paper", "srigl_table")]
        [60.79, 61.19]
    """
    check_count("update_every", update_every)
    if not 0 <= sparse <= dense < math.inf:
        raise TrainerError(f"sparse is {sparse} and dense {dense}, but 0 <= sparse <= dense must hold: FLOPs of a pass")
    if formula not in ("rigl_paper", "srigl_table"):
        raise TrainerError(f'the formula is {formula!r}; choose "rigl_paper" or "srigl_table"')
    if method == "dense":
        return 3.0 * dense
    if method in ("static", "set"):
        return 3.0 * sparse
    if method in ("rigl", "srigl"):
        update = (2.0 if formula == "rigl_paper" else 4.0) * sparse + dense
        return (update_every * 3.0 * sparse + update) / (update_every + 1)
    if method == "snfs":
        return 2.0 * sparse + dense
    if method != "gmp":
        raise TrainerError(f"the method is {method!r}; choose dense, static, set, rigl, srigl, snfs or gmp")
    if total_steps is None:
        raise TrainerError("what gradual pruning costs depends on its schedule: give total_steps")
    check_count("total_steps", total_steps)
    check_share("stop_at", stop_at)
    last = last_update_step(every=update_every, end=end_step(total_steps, stop_at))
    if not last:
        raise TrainerError(f"no update lies before {stop_at} of {total_steps} steps: lower update_every")
    pruned = sum(
        cubic_sparsity(min(step // update_every * update_every, last), final=1.0, end=last)
        for step in range(total_steps)
    )
    return 3.0 * (dense - (dense - sparse) * pruned / total_steps)


def measured_densities(model: nn.Module) -> dict[str, float]:
    """The share of weights that each mask of ``model`` keeps now, by the weight's name.

    Example:
        >>> from srigl_fx import sparsify
        >>> measured_densities(sparsify(nn.Sequential(nn.Linear(8, 4)), sparsity=0.75))
        {'0.weight': 0.25}
    """
    return {name: int(mask.sum()) / mask.numel() for name, mask in named_masks(model)}


@torch.no_grad()
def layer_costs(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, LayerCost]:
    """The cost of every weight that ``model`` contracts with something, sparse or dense, by running it once.

    Found are matrix products and convolutions, in modules or in plain functions; a weight that is used twice costs
    twice. One that is computed with before it is contracted, as by weight normalisation, is not found. Random numbers
    (of the CPU) and buffers that a forward pass changes are restored. The meta device works too.

    Args:
        model: Any model.
        example_inputs: Its arguments; the first tensor's leading dimension is the number of samples.

    Raises:
        TrainerError: There is no tensor among the inputs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
        >>> costs = layer_costs(model, (torch.ones(2, 3, 6, 6),))
        >>> list(costs), costs["0.weight"] == LayerCost.of((8, 3, 3, 3), positions=16)
        (['0.weight', '3.weight'], True)
    """
    samples = next((leaf.shape[0] for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if not samples:
        raise TrainerError("the example inputs hold no tensor with a leading dimension: give those of a forward call")
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    fast_path = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # its one operation hides the products inside
    try:
        with torch.random.fork_rng(devices=[]), restored(model), _Contractions(weights) as seen:
            args, kwargs = copies((example_inputs, {}))  # a forward may write into its inputs
            model(*args, **kwargs)
    finally:
        mha.set_fastpath_enabled(fast_path)
    return {
        name: LayerCost(products=products // samples, outputs=outputs // samples, activation=name in seen.convolved)
        for name, (products, outputs) in seen.counts.items()
    }


class _Contractions(TorchDispatchMode):
    """Counts products and outputs of the operations that contract a parameter, whatever views of it they are given."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {_storage(weight): name for name, weight in weights.items()}
        self._operands = {
            torch.ops.aten.mm: (0, 1),
            torch.ops.aten.bmm: (0, 1),
            torch.ops.aten.mv: (0, 1),
            torch.ops.aten.addmm: (1, 2),
            torch.ops.aten.addmv: (1, 2),
            torch.ops.aten.baddbmm: (1, 2),
        }
        # Copies in another layout or precision, kept so that their memory is not given to others.
        self._copies: list[Tensor] = []
        self.counts: dict[str, tuple[int, int]] = {}
        self.convolved: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation is torch.ops.aten.convolution:
            inputs, weight, transposed = args[0], args[1], args[6]
            positions = (inputs if transposed else result).numel() * weight.numel() // weight.shape[0]
            if name := self._add((weight,), positions, result.numel()):
                self.convolved.add(name)
        elif operation in self._operands:
            left, right = (args[index] for index in self._operands[operation])
            self._add((left, right), result.numel() * left.shape[-1], result.numel())
        elif operation in (torch.ops.aten.clone, torch.ops.aten._to_copy) and _storage(args[0]) in self._names:
            self._names[_storage(result)] = self._names[_storage(args[0])]
            self._copies.append(result)
        return result

    def _add(self, operands: tuple[Tensor, ...], products: int, outputs: int) -> str | None:
        name = next((self._names[key] for key in map(_storage, operands) if key in self._names), None)
        if name is not None:
            before = self.counts.get(name, (0, 0))
            self.counts[name] = before[0] + products, before[1] + outputs
        return name


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
