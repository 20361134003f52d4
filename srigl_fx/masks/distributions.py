"""How one global sparsity is shared out among layers.

Owns the layer-wise distributions, as pure functions from weight shapes to densities. It must not know modules, rules
or masks: which weights count, and which of them stay dense, is the caller's decision.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.budgets import budget

_log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]


def erk(shapes: Shapes, sparsity: float, *, dense: Collection[str] = ()) -> dict[str, float]:
    """Erdős-Rényi-kernel densities: a layer's density is proportional to sum(dims) / prod(dims).

    Layers that would need a density above 1 become dense, and the others make up for it, as they do for the layers in
    ``dense``. Source: RigL (Evci et al., 2020), section 3; Sparse Evolutionary Training (Mocanu et al., 2018).

    Args:
        shapes: Weight shape by name; convolution kernels with all their dimensions.
        sparsity: Share of zeros over all layers together, in [0, 1).
        dense: Names that keep every weight and still count in the total.

    Returns:
        Density in (0, 1] by name, in the order of ``shapes``.

    Raises:
        SparsifyError: The sparsity is out of range, a shape is empty, ``dense`` names an unknown layer, or the dense
            layers alone exceed the total.

    Example:
        >>> erk({"a": (8, 4), "b": (16, 16)}, 0.5)
        {'a': 1.0, 'b': 0.4375}
    """
    sizes = _sizes(shapes, sparsity, dense)
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    zeros = {name: budget(size, sparsity) for name, size in sizes.items()}
    full = set(dense)
    while sparse := [name for name in shapes if name not in full]:
        kept = sum(sizes[name] - zeros[name] for name in sparse) - sum(zeros[name] for name in full)
        if kept <= 0:
            raise SparsifyError(_too_many_dense(sizes, sparsity, full))
        scale = kept / sum(raw[name] * sizes[name] for name in sparse)
        highest = max(raw[name] for name in sparse)
        if scale * highest <= 1.0:
            return {name: 1.0 if name in full else scale * raw[name] for name in shapes}
        full.update(name for name in sparse if raw[name] == highest)
    return dict.fromkeys(shapes, 1.0)


def uniform(shapes: Shapes, sparsity: float, *, dense: Collection[str] = ()) -> dict[str, float]:
    """The same density for every layer outside ``dense``, chosen so that the global density is exact.

    Where the dense layers alone exceed the total, the others get ``1 - sparsity`` and a warning is logged.

    Args:
        shapes: Weight shape by name.
        sparsity: Share of zeros over all layers together, in [0, 1).
        dense: Names that keep every weight and still count in the total.

    Raises:
        SparsifyError: The sparsity is out of range, a shape is empty or ``dense`` names an unknown layer.

    Example:
        >>> uniform({"a": (8, 4), "b": (16, 16)}, 0.5, dense=["a"])
        {'a': 1.0, 'b': 0.4375}
    """
    sizes = _sizes(shapes, sparsity, dense)
    fixed = sum(sizes[name] for name in dense)
    free = sum(sizes.values()) - fixed
    density = 1.0 - sparsity
    if free:
        exact = ((fixed + free) * density - fixed) / free
        if exact > 0.0:
            density = min(1.0, exact)
        else:
            _log.warning("%s; the other layers get density %.4g", _too_many_dense(sizes, sparsity, set(dense)), density)
    return {name: 1.0 if name in dense else density for name in shapes}


def uniform_rigl(shapes: Shapes, sparsity: float, *, dense: Collection[str] = ()) -> dict[str, float]:
    """The first layer dense and every other one exactly at ``sparsity``, without compensation.

    Source: the "uniform" distribution of RigL (Evci et al., 2020), section 3.

    Args:
        shapes: Weight shape by name; the first name is the first layer.
        sparsity: Share of zeros of each sparse layer, in [0, 1).
        dense: Further names that keep every weight.

    Raises:
        SparsifyError: The sparsity is out of range, a shape is empty or ``dense`` names an unknown layer.

    Example:
        >>> uniform_rigl({"stem": (8, 4), "body": (16, 16), "head": (10, 16)}, 0.75)
        {'stem': 1.0, 'body': 0.25, 'head': 0.25}
    """
    _sizes(shapes, sparsity, dense)
    first = next(iter(shapes), None)
    return {name: 1.0 if name == first or name in dense else 1.0 - sparsity for name in shapes}


DISTRIBUTIONS: dict[str, Callable[..., dict[str, float]]] = {
    "erk": erk,
    "uniform": uniform,
    "uniform_rigl": uniform_rigl,
}
"""The distributions by the names that ``sparsify`` takes."""


def is_distribution(value: object) -> bool:
    """Whether this is the name of a distribution, or pairs of names and densities in (0, 1].

    Example:
        >>> is_distribution("erk"), is_distribution((("fc", 0.5),)), is_distribution((("fc", 1.5),))
        (True, True, False)
    """
    if isinstance(value, str):
        return value in DISTRIBUTIONS
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], int | float)
        and not isinstance(pair[1], bool)
        and 0.0 < pair[1] <= 1.0
        for pair in value
    )


def _sizes(shapes: Shapes, sparsity: float, dense: Collection[str]) -> dict[str, int]:
    """The number of weights of each layer, after checking the arguments all distributions share."""
    if not 0.0 <= sparsity < 1.0:
        raise SparsifyError(
            f"the sparsity is {sparsity}, but must lie in [0, 1): it is the share of weights set to zero"
        )
    if unknown := sorted(set(dense) - set(shapes)):
        raise SparsifyError(f"layers to keep dense that are not among the shapes: {', '.join(unknown)}")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name, size in sizes.items():
        if size <= 0:
            raise SparsifyError(
                f"{name}: a weight of shape {tuple(shapes[name])} has nothing to distribute; leave it out"
            )
    return sizes


def _too_many_dense(sizes: Mapping[str, int], sparsity: float, dense: set[str]) -> str:
    held = sum(sizes[name] for name in dense)
    total = sum(sizes.values())
    return (
        f"the layers kept dense ({', '.join(name for name in sizes if name in dense)}) hold {held} weights, but "
        f"sparsity {sparsity} allows {budget(total, 1.0 - sparsity)} of {total} in all: lower the sparsity, "
        'keep fewer dense, or use the distribution "uniform_rigl", which does not compensate'
    )
