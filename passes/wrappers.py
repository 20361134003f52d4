"""What stands around a model without being part of it.

Owns how the model inside is found. It must not know what it is wanted for.
"""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s module, ``DataParallel`` or ``DistributedDataParallel``, however nested.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> unwrapped(DataParallel(layer)) is layer, unwrapped(layer) is layer
        (True, True)
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif (inner := dict(model.named_children()).get("_orig_mod")) is not None:  # of torch.compile's module
            model = inner
        else:
            return model
