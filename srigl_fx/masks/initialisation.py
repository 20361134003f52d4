"""The first values of the kept weights.

Owns the weight initialisation schemes that account for a sparse fan-in. Works on (n, F) matrices; it must not know
modules or how the mask was drawn.
"""

from typing import Literal

import torch
from torch import Tensor

from srigl_fx.errors import StructureError

WeightInit = Literal["keep", "kaiming", "torch", "grad_flow_ref"]


def initialise(weight: Tensor, mask: Tensor, scheme: WeightInit, generator: torch.Generator) -> Tensor:
    """New values for a masked weight, scaled by the fan-in k that the mask leaves each neuron.

    ==================  =========================================================================================
    ``keep``            the values of ``weight``
    ``kaiming``         normal, standard deviation sqrt(2 / k): Gradient Flow in Sparse Neural Networks (Evci et al.,
                        AAAI 2022)
    ``torch``           uniform in [-1 / sqrt(k), 1 / sqrt(k)], as torch initialises a linear layer of fan-in k
    ``grad_flow_ref``   normal, standard deviation 2 / k, as SRigL's published experiments used
    ==================  =========================================================================================

    Args:
        weight: Matrix view (n, F) of the weight.
        mask: Bool mask (n, F).
        scheme: One of the table.
        generator: Source of the draw; unused for "keep".

    Returns:
        A new tensor (n, F) of the weight's dtype and device, exactly zero off the mask.

    Raises:
        StructureError: Shapes differ, or the scheme is unknown.

    Example:
        >>> mask = torch.tensor([[True, False, True], [False, False, False]])
        >>> initialise(torch.ones(2, 3), mask, "keep", torch.Generator()).tolist()
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if weight.ndim != 2 or weight.shape != mask.shape:
        raise StructureError(
            f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} must be matrices of the same shape"
        )
    if scheme == "keep":
        return weight.detach().masked_fill(~mask, 0.0)
    # Rows without any weight divide by 1; all their values are masked away below.
    fan_in = mask.sum(dim=1, keepdim=True).clamp(min=1).to(generator.device, torch.float32)
    values = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
    if scheme == "kaiming":
        values.normal_(generator=generator).mul_((2.0 / fan_in).sqrt())
    elif scheme == "torch":
        values.uniform_(-1.0, 1.0, generator=generator).div_(fan_in.sqrt())
    elif scheme == "grad_flow_ref":
        values.normal_(generator=generator).mul_(2.0 / fan_in)
    else:
        raise StructureError(
            f'the weight initialisation is {scheme!r}; choose "keep", "kaiming", "torch" or "grad_flow_ref"'
        )
    return values.to(weight.device, weight.dtype).masked_fill(~mask, 0.0)
