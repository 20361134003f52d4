"""The numbers and distributions of sparse training in TensorBoard.

Owns the tags and what is drawn under them. It must not know training loops: whoever runs one calls
:func:`write_masks` after an update.
"""

import torch

from srigl_fx.errors import TrainerError
from srigl_fx.integrations.attachment import extra
from srigl_fx.masks.records import SparseWeight, plain, sparse_weights
from srigl_fx.masks.shards import local, part
from srigl_fx.train.metrics import MaskMetrics

with extra("tensorboard", "tensorboard"):
    from torch.utils.tensorboard import SummaryWriter


@torch.no_grad()
def write_masks(
    writer: SummaryWriter, metrics: MaskMetrics, step: int | None = None, *, histograms: bool = True
) -> None:
    """Write the numbers of the last update, and how connections, weights and neurons are distributed.

    Scalars, for each masked weight and ``total``: ``sparsity``, ``fan_in``, ``active_neurons``, ``active_share``,
    ``itop`` and ``change_rate``; the tag is ``<number>/<weight>``. Histograms: ``fan_out/<weight>``, for each input the
    number of neurons it feeds; ``magnitude/<weight>``, of the weights in the mask; ``active_share_by_layer``, one
    value a layer.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        metrics: Of the run.
        step: Where on the time axis; by default the step of the last update.
        histograms: Write the histograms too; they look at every weight.

    Raises:
        TrainerError: There is no update yet and no step is given.

    Example:
        >>> import tempfile
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(32, 16)), sparsity=0.75)
        >>> trainer = sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     write_masks(writer, MaskMetrics(trainer), step=0)
    """
    at = metrics.step if step is None else step
    if at is None:
        raise TrainerError("the masks have not been updated yet: pass the step to write them at, step=0")
    for tag, value in metrics.flat().items():
        writer.add_scalar(tag, value, at)
    if not histograms:
        return
    for handle in sparse_weights(metrics.trainer.model):
        name = plain(handle.fqn)
        writer.add_histogram(f"fan_out/{name}", handle.record.site.to_matrix(handle.mask).sum(dim=0), at)
        if (magnitudes := _magnitudes(handle)).numel():
            writer.add_histogram(f"magnitude/{name}", magnitudes, at)
    shares = torch.tensor([numbers["active_share"] for numbers in metrics.layers().values()])
    writer.add_histogram("active_share_by_layer", shares, at)


def _magnitudes(handle: SparseWeight) -> torch.Tensor:
    """|w| of the weights in the mask that are finite, as far as this process holds them."""
    own = local(handle.weight.detach())
    values = own[part(handle.mask, handle.weight)].float().abs()
    return values[torch.isfinite(values)]
