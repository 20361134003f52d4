"""Sparse training in the Trainer of Hugging Face transformers, by a callback.

Owns the translation between that Trainer's events and :class:`~srigl_fx.integrations.attachment.SparseTraining`. It
must not know how masks are chosen or kept.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.integrations.attachment import SparseTraining, extra
from srigl_fx.integrations.pretrained import MASKS_FILE, contents_of, from_pretrained, save_pretrained
from srigl_fx.train.base import Trainer
from srigl_fx.train.checkpoint_file import read, write
from srigl_fx.train.srigl import SRigL

with extra("transformers", "transformers", "accelerate"):
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["MASKS_FILE", "STATE_FILE", "SRigLCallback", "from_pretrained", "save_pretrained"]

STATE_FILE = "srigl_fx.safetensors"

_log = logging.getLogger(__name__)


class SRigLCallback(SparseTraining, TrainerCallback):
    """Trains a sparsified model with SRigL, or another method, in an ordinary ``transformers.Trainer``.

    The method is attached when training begins and detached when it ends. Its state lies beside each checkpoint of
    the Trainer, in ``srigl_fx.safetensors``, and comes back with ``resume_from_checkpoint``.

    Args:
        method: The training method: ``SRigL``, ``RigL``, ``SET``, ``SNFS``, ``GMP``, ``Static`` or one of your own.
        total_steps: Optimizer steps of the whole training; by default the Trainer's ``max_steps``.
        log_updates: Ask the Trainer for a log entry at each update; else the numbers join its next one.
        log_layers: Log the numbers of each layer too, not only the totals.
        detach_at_end: Remove the hooks when training ends.
        resume_from: The checkpoint folder the state is read from on a resume; by default
            ``<output_dir>/checkpoint-<step>``. Needed where ``resume_from_checkpoint`` lies elsewhere.
        **options: Arguments of the method, such as ``update_every``.

    Raises:
        TrainerError: The method does not know an option; or, when training begins: the model is not sparsified, the
            arguments do not fit, or a resumed checkpoint holds no state that fits.

    Example:
        >>> callback = SRigLCallback(update_every=50, ablation=0.5)
        >>> callback.options
        {'update_every': 50, 'ablation': 0.5}
    """

    def __init__(
        self,
        method: Callable[..., Trainer] = SRigL,
        *,
        total_steps: int | None = None,
        log_updates: bool = True,
        log_layers: bool = False,
        detach_at_end: bool = True,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Remember the arguments: their names are checked now, their values when training begins."""
        super().__init__(method, total_steps=total_steps, **options)
        self.log_updates = log_updates
        self.log_layers = log_layers
        self.detach_at_end = detach_at_end
        self.resume_from = resume_from
        self._unlogged = False

    def add_to(self, trainer: Any) -> "SRigLCallback":
        """Put this callback before those that report to TensorBoard and the like, so that they see its numbers.

        A callback passed as ``Trainer(callbacks=[...])`` comes after them; its numbers reach ``state.log_history`` and
        the printed log alone.

        Args:
            trainer: The ``transformers.Trainer``.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **context: Any,
    ) -> None:
        """Attach, now that the optimizer and the number of steps are known."""
        saved = self._saved(args, state) if state.global_step > 0 else None
        self.attach(context["model"], _innermost(context["optimizer"]), total_steps=state.max_steps, state=saved)
        self._unlogged = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Look whether this step updated the masks."""
        if self.poll():
            self._unlogged = True
            control.should_log |= self.log_updates

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **context: Any,
    ) -> None:
        """Add the numbers of the last update to the Trainer's log entry."""
        logs: dict[str, float] = context["logs"]
        if self._unlogged and self.metrics is not None and "loss" in logs:
            numbers = {f"srigl/{name}": value for name, value in self.metrics.flat(layers=self.log_layers).items()}
            logs.update(numbers)
            state.log_history[-1].update(numbers)
            self._unlogged = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Write the state beside the checkpoint that was just saved, whole or not at all."""
        contents = {"step": state.global_step, **self.sparse_state()}  # on every process: it may communicate
        if not args.should_save:
            return
        folder = _folder(args, state)
        if folder.is_dir():
            write(folder / MASKS_FILE, contents_of(context["model"]))
            if not args.save_only_model:
                write(folder / STATE_FILE, contents)
        else:
            _log.warning("there is no checkpoint %s to save the state of sparse training in", folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Detach: the model keeps its masks, and a warning says if they are fuller than they should be."""
        self.warn_if_over_budget()
        if self.detach_at_end:
            self.detach()

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """The state that belongs to the checkpoint the Trainer has resumed from."""
        folder = _folder(args, state) if self.resume_from is None else Path(self.resume_from)
        if not (folder / STATE_FILE).is_file():
            raise TrainerError(
                f"the run resumes at step {state.global_step}, but {folder} holds no {STATE_FILE}: pass "
                "SRigLCallback(resume_from=...) if the checkpoint lies elsewhere, resume from another one, or start a "
                "new run from its weights, without resume_from_checkpoint"
            )
        contents = read(folder / STATE_FILE)
        if contents.get("step") != state.global_step:
            raise TrainerError(
                f"{folder / STATE_FILE} is of step {contents.get('step')}, but the run resumes at step "
                f"{state.global_step}: pass SRigLCallback(resume_from=...) with the folder of that checkpoint"
            )
        return contents


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers: the one whose step hooks run."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
