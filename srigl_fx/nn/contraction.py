"""A functional weight use as a module, for the graph of a whole model.

Owns :class:`MaskedContraction`; it must not know where in a graph it stands. It holds no parameter: the weight stays an
operand of its node under the name it always had.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class MaskedContraction(nn.Module):
    """Calls the function (or the tensor method) that used a mask-managed weight, with the operands of its node.

    The mask is an operand too, so that the graph shows it and its copies keep it; the weight is exactly zero off it, so
    there is nothing to compute with it.

    Example:
        >>> import torch
        >>> layer = MaskedContraction(torch.nn.functional.linear, "fc.weight")
        >>> layer(torch.ones(1, 2), torch.eye(2), mask=torch.eye(2) > 0), layer
        (tensor([[1., 1.]]), MaskedContraction(linear, weight=fc.weight))
    """

    def __init__(self, function: Callable[..., Any] | str, weight: str) -> None:
        super().__init__()
        self.function = function
        self.weight_name = weight

    def forward(self, *args: Any, mask: Tensor, **kwargs: Any) -> Tensor:
        """Call the function with all operands but the mask."""
        if isinstance(self.function, str):
            result: Tensor = getattr(args[0], self.function)(*args[1:], **kwargs)
            return result
        return self.function(*args, **kwargs)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The function and the weight's name."""
        name = (
            self.function if isinstance(self.function, str) else getattr(self.function, "__name__", str(self.function))
        )
        return f"{name}, weight={self.weight_name}"
