"""A mask goes where its weight goes when torch takes a transform of that weight off again.

Owns the move of a mask and its record to the parameter that is left, and the refusal of ``torch.nn.utils.prune``, whose
own mask would have the name of ours. It must not know what the transforms compute: all that can be taken off leave
zeros where the mask has them, since what the model used was zero there.
"""

from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from srigl_fx.errors import InvariantError
from srigl_fx.masks.records import MASK_SUFFIX, move_record, note_moved, records_on

_COMPUTED = "_srigl_fx_computed"
_PARAMETRIZATIONS = ".parametrizations."


def holder_of(fqn: str) -> tuple[str, str]:
    """Of a ParametrizationList, the module with the parametrised attribute, and the attribute.

    Example:
        >>> holder_of("fc.parametrizations.weight"), holder_of("parametrizations.weight")
        (('fc', 'weight'), ('', 'weight'))
    """
    name, _, attr = f".{fqn}".rpartition(_PARAMETRIZATIONS)
    return name.removeprefix("."), attr


def watch(holder: nn.Module, attr: str, parametrizations: nn.Module) -> None:
    """Remember the list that holds the mask of a parametrised weight: once it is removed, nothing else does.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> watch(layer, "weight", layer.parametrizations.weight)
    """
    vars(holder)[_COMPUTED] = {**vars(holder).get(_COMPUTED, {}), attr: parametrizations}


def take_over(holder: nn.Module, attr: str) -> None:
    """Move the mask to a parameter that was computed until now, where that is so.

    Example:
        >>> take_over(nn.Linear(3, 2), "weight")
    """
    computed: dict[str, ParametrizationList] = vars(holder).get(_COMPUTED, {})
    if attr not in computed or holder._parameters.get(attr) is None:
        return
    former = computed.pop(attr)
    for name, record in list(records_on(former).items()):
        if record.sparse:
            move_mask(former, name, holder, attr)


def move_mask(source: nn.Module, name: str, owner: nn.Module, attr: str) -> None:
    """Have the mask of ``source``'s weight ``name`` be that of ``owner``'s weight ``attr``.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 32))), sparsity=0.5)
        >>> _ = nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        >>> [name for name, _ in sx.masks.named_masks(model)]
        ['0.weight']
    """
    mask = source.get_buffer(name + MASK_SUFFIX)
    if not hasattr(owner, attr + MASK_SUFFIX):  # else verify says that what has the name is no mask
        owner.register_buffer(attr + MASK_SUFFIX, mask)
    site = records_on(source)[name].site
    holder = site.owner if source is owner else holder_of(site.owner)[0]
    move_record(source, name, owner, replace(site, owner=holder, attr=attr))
    if owner._parameters[attr] is not source._parameters.get(name):
        # A trainer that is attached may go on with a parameter that stays, not with one that the optimizer lacks.
        note_moved(source, name, f"{holder}.{attr}" if holder else attr)
        del source._buffers[name + MASK_SUFFIX]


def refuse_pruning(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Refuse the first thing that ``torch.nn.utils.prune`` does to a weight: to register it under a second name.

    Raises:
        InvariantError: It is a weight with a mask of ours.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> refuse_pruning(layer, "weight_orig", layer.weight)
    """
    attr = name.removesuffix("_orig")
    if attr == name or parameter is None or module._parameters.get(attr) is not parameter:
        return
    if (record := records_on(module).get(attr)) is not None and record.sparse:
        raise InvariantError(
            f"torch.nn.utils.prune cannot be applied to {record.site.fqn!r}: the weight has a mask, "
            f"{attr + MASK_SUFFIX!r}, and prune would write its own under that name; call srigl_fx.finalize(model) "
            "first"
        )
