"""Which weights of a model were given masks, so that one that lost its own is noticed.

Owns a list that the sparsified model keeps beside the records on its parts: a part that is exchanged takes its records
along, and a tied weight that is untied leaves them with one of the two. It must not look at the values of masks.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from srigl_fx.masks.presence import parameter_at
from srigl_fx.masks.records import WeightRecord, keep_on, kept_on, sparse_weights

_MASKED = "_srigl_fx_masked"

Shape = tuple[int, ...]


def note_masked(model: nn.Module, records: Iterable[WeightRecord]) -> None:
    """Note on the model itself which of its weights have masks, under all names of tied ones.

    Example:
        >>> note_masked(nn.Linear(3, 2), [])
    """
    sites = [record.site for record in records if record.sparse]
    keep_on(model, _MASKED, {name: site.shape for site in sites for name in (site.fqn, *site.aliases)})


def unmasked_since(model: nn.Module) -> Iterator[str]:
    """The names of the weights that stand where weights with masks stood, as large as those, and have none.

    A layer of another size is taken for what it is, a new one; one that is gone has nothing to check.

    Example:
        >>> list(unmasked_since(nn.Linear(3, 2)))
        []
    """
    for prefix, module in model.named_modules():
        noted: dict[str, Shape] | None = kept_on(module, _MASKED)
        if noted:
            masked = {id(handle.weight) for handle in sparse_weights(module)}
            for name, shape in noted.items():
                parameter = parameter_at(module, name)
                if parameter is not None and parameter.shape == shape and id(parameter) not in masked:
                    yield f"{prefix}.{name}" if prefix else name


def let_go(model: nn.Module, names: Iterable[str]) -> None:
    """Take weights off the list, by their names in ``model``.

    Example:
        >>> let_go(nn.Linear(3, 2), ["weight"])
    """
    gone = set(names)
    for prefix, module in model.named_modules():
        noted: dict[str, Shape] | None = kept_on(module, _MASKED)
        if noted:
            kept = {
                name: shape for name, shape in noted.items() if (f"{prefix}.{name}" if prefix else name) not in gone
            }
            keep_on(module, _MASKED, kept)
