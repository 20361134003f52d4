"""How many weights a layer may keep.

Owns the one conversion from a density to a whole number of weights. It must not know how densities are chosen
(:mod:`srigl_fx.masks.distributions`) or how the weights are laid out (:mod:`srigl_fx.masks.structures`).
"""

import math

from srigl_fx.errors import SparsifyError

# Far above the rounding error of ``elements * (1 - sparsity)``, far below one weight.
_SLACK = 1e-6


def budget(elements: int, density: float) -> int:
    """The number of weights, rounded down, that a layer of ``elements`` weights keeps at ``density``.

    Plain ``int(100 * (1 - 0.9))`` is 9, because ``1 - 0.9`` is a little less than a tenth; this one gives 10.

    Args:
        elements: Number of weights of the dense layer, at least 0.
        density: Share of them to keep, in [0, 1].

    Raises:
        SparsifyError: ``elements`` is negative, or ``density`` is outside [0, 1] or not a number.

    Example:
        >>> budget(100, 1 - 0.9), budget(1000, 1 - 0.99), budget(7, 0.5)
        (10, 10, 3)
    """
    if elements < 0:
        raise SparsifyError(f"a layer cannot have {elements} weights: pass the product of the weight's shape")
    if not 0.0 <= density <= 1.0:
        raise SparsifyError(f"the density is {density}, but must lie in [0, 1] (it is 1 - sparsity)")
    return min(elements, math.floor(elements * density + _SLACK))
