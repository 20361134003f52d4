"""Sparse training in the Trainer of Lightning, by a callback.

Owns the translation between that Trainer's events and :class:`~srigl_fx.integrations.attachment.SparseTraining`. It
must not know how masks are chosen or kept. Works with ``lightning`` and with ``pytorch_lightning``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.integrations.attachment import SparseTraining, extra
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train.base import Trainer
from srigl_fx.train.srigl import SRigL

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch import Trainer as LightningTrainer
else:
    with extra("lightning", "lightning", "pytorch_lightning"):
        try:
            from lightning.pytorch import Callback
        except ModuleNotFoundError:
            from pytorch_lightning import Callback


class SRigLCallback(SparseTraining, Callback):
    """Trains a sparsified module with SRigL, or another method, in an ordinary Lightning ``Trainer``.

    The method is attached when training begins and detached when the fit ends. Its state is in every checkpoint and
    comes back with ``trainer.fit(..., ckpt_path=...)``. At each update the numbers go to the loggers, and the totals
    to ``trainer.callback_metrics``.

    Args:
        method: The training method: ``SRigL``, ``RigL``, ``SET``, ``SNFS``, ``GMP``, ``Static`` or one of your own.
        module: The part of the LightningModule to train, by its name, where it has several optimizers; all by default.
        total_steps: Optimizer steps of the whole training; by default the Trainer's ``estimated_stepping_batches``.
        log_layers: Log the numbers of each layer too, not only the totals.
        prog_bar: Show the totals of sparsity and change rate in the progress bar.
        detach_at_end: Remove the hooks when the fit ends.
        **options: Arguments of the method, such as ``update_every``.

    Raises:
        TrainerError: The method does not know an option; or, when training begins: the module is not sparsified, no
            optimizer holds its masked weights, the arguments do not fit, or the checkpoint holds no state that fits.

    Example:
        >>> callback = SRigLCallback(update_every=50, ablation=0.5)
        >>> callback.state_key
        'SRigLCallback{"module": ""}'
    """

    def __init__(
        self,
        method: Callable[..., Trainer] = SRigL,
        *,
        module: str = "",
        total_steps: int | None = None,
        log_layers: bool = True,
        prog_bar: bool = False,
        detach_at_end: bool = True,
        **options: Any,
    ) -> None:
        """Remember the arguments: their names are checked now, their values when training begins."""
        super().__init__(method, total_steps=total_steps, **options)
        self.module = module
        self.log_layers = log_layers
        self.prog_bar = prog_bar
        self.detach_at_end = detach_at_end
        self._loaded: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint: one for each part that is trained."""
        return f'SRigLCallback{{"module": "{self.module}"}}'

    def on_train_start(self, trainer: "LightningTrainer", pl_module: "LightningModule") -> None:
        """Attach, now that model and optimizers are what they were when the checkpoint was saved."""
        try:
            part: nn.Module = pl_module.get_submodule(self.module)
        except AttributeError as error:
            raise TrainerError(
                f"{type(pl_module).__name__} has no part {self.module!r}: pass the name of a module in it as module="
            ) from error
        # A further fit with the same Trainer goes on counting, and so does this callback.
        state = (self._loaded or self.sparse_state()) if trainer.global_step else None
        if state is not None and not state:
            raise TrainerError(
                f"the run resumes at step {trainer.global_step}, but its checkpoint holds no state of this callback: "
                "resume from one that was saved with it, or start a new run from its weights, without ckpt_path"
            )
        optimizer = _holding(part, trainer.optimizers)
        self.attach(part, optimizer, total_steps=trainer.estimated_stepping_batches, state=state)
        self._loaded = {}

    def on_train_batch_end(
        self, trainer: "LightningTrainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers if this batch ended with an update of the masks."""
        if not self.poll() or self.metrics is None:
            return
        prefix = f"srigl/{self.module}/" if self.module else "srigl/"
        numbers = {prefix + name: value for name, value in self.metrics.flat(layers=self.log_layers).items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        for name, value in self.metrics.total().items():
            shown = self.prog_bar and name in ("sparsity", "change_rate")
            pl_module.log(f"{prefix}{name}", float(value), on_step=True, prog_bar=shown, logger=False)

    def teardown(self, trainer: "LightningTrainer", pl_module: "LightningModule", stage: str) -> None:
        """Detach when the fit has ended: the module keeps its masks; a warning says if they are too full."""
        if stage != "fit":
            return
        self.warn_if_over_budget()
        if self.detach_at_end:
            self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in its checkpoints."""
        return self.sparse_state() or self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: model and optimizers are loaded at other times."""
        self._loaded = state_dict


def _holding(model: nn.Module, optimizers: list[Optimizer]) -> Optimizer:
    """The optimizer of the masked weights; the first one where none is, so that the trainer's error says what is."""
    weights = {id(handle.weight) for handle in sparse_weights(model)}
    for optimizer in optimizers:
        if any(id(parameter) in weights for group in optimizer.param_groups for parameter in group["params"]):
            return optimizer
    if not optimizers:
        raise TrainerError("configure_optimizers returned no optimizer: sparse training needs one")
    return optimizers[0]
