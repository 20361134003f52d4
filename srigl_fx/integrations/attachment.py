"""What the callbacks of all frameworks share: attaching a method to a run, its metrics, and the state of both.

Owns :class:`SparseTraining`, a mix-in for callbacks, and the error for a missing extra. It must not know any framework.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from srigl_fx.errors import MissingExtraError, TrainerError
from srigl_fx.masks.records import plain, sparse_weights
from srigl_fx.recipe_parts import to_plain
from srigl_fx.recipes import recipes_of
from srigl_fx.train.base import Trainer
from srigl_fx.train.metrics import MaskMetrics
from srigl_fx.train.srigl import SRigL

_log = logging.getLogger(__name__)


@contextmanager
def extra(name: str, *packages: str) -> Iterator[None]:
    """Turn the failed import of one of ``packages`` into an error that names the extra.

    Raises:
        MissingExtraError: One of the packages is not installed.

    Example:
        >>> with extra("tensorboard", "tensorboard"):
        ...     import tensorboard
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in packages:
            raise
        raise MissingExtraError(f"{missing} is not installed: pip install 'srigl-fx[{name}]'") from error


class SparseTraining:
    """A training method that is attached when a run begins and detached when it ends.

    Copies, by deepcopy or pickle, carry the arguments alone: they are attached to nothing.

    Attributes:
        sparse_trainer: The attached (or, after the run, the last) training method; None before the first run.
        metrics: Its numbers.
    """

    def __init__(
        self, method: Callable[..., Trainer] = SRigL, *, total_steps: int | None = None, **options: Any
    ) -> None:
        """Remember the method and its arguments: their names are checked now, their values when the run begins.

        Raises:
            TrainerError: The method does not take these arguments.
        """
        try:
            inspect.signature(method).bind(None, None, total_steps=1, **options)
        except TypeError as error:
            raise TrainerError(
                f"{_name(method)} cannot be called with the options of this callback ({error}); its signature is "
                f"{_name(method)}({', '.join(inspect.signature(method).parameters)})"
            ) from error
        self.method = method
        self.total_steps = total_steps
        self.options = options
        self.sparse_trainer: Trainer | None = None
        self.metrics: MaskMetrics | None = None

    def attach(
        self, model: nn.Module, optimizer: Optimizer, *, total_steps: float, state: dict[str, Any] | None = None
    ) -> None:
        """Attach to a run, or go on with the one that ``state`` is from.

        Raises:
            TrainerError: The model is not sparsified, the number of steps is unknown, or the state does not fit;
                nothing is attached then.
        """
        self.detach()
        steps = total_steps if self.total_steps is None else self.total_steps
        if not math.isfinite(steps) or steps < 1:
            raise TrainerError(
                f"the run is to take {steps} optimizer steps, but the schedule of {_name(self.method)} needs their "
                "number: limit the run, or pass total_steps= to the callback"
            )
        if not sparse_weights(model):
            raise TrainerError(
                f"{type(model).__name__} has no mask-managed weight: call srigl_fx.sparsify on the model (in place, "
                "before the run begins), and give this very object to the run"
            )
        trainer = self.method(model, optimizer, total_steps=int(steps), **self.options)
        try:
            metrics = MaskMetrics(trainer)
            if state is not None:
                if not isinstance(state, dict) or not {"trainer", "metrics"} <= state.keys():
                    raise TrainerError("this is no state of a SRigLCallback: load another checkpoint")
                trainer.load_state_dict(state["trainer"])  # first: it may set the masks that the metrics are of
                metrics.load_state_dict(state["metrics"])
        except BaseException:
            trainer.detach()
            raise
        self.sparse_trainer, self.metrics = trainer, metrics

    def detach(self) -> None:
        """Remove the hooks, if there are any; the trainer and the metrics can still be looked at."""
        if self.sparse_trainer is not None:
            self.sparse_trainer.detach()

    def warn_if_over_budget(self) -> None:
        """Say in the log, at the end of a run, that pruning has not brought the model down to its sparsity."""
        handles = [] if self.sparse_trainer is None else sparse_weights(self.sparse_trainer.model)
        over = [
            plain(handle.fqn) for handle in handles if int(handle.mask.count_nonzero()) > sum(handle.record.budgets)
        ]
        if over:
            _log.warning(
                "training ends with a model that is not as sparse as asked for: %d of %d masks keep more than their "
                "budget, first that of %s. Pruning did not end: the last of its updates was not reached, or an earlier "
                "checkpoint was loaded; train it to the end of pruning, or load a later checkpoint",
                len(over),
                len(handles),
                over[0],
            )

    def sparse_state(self) -> dict[str, Any]:
        """The state of method and metrics; empty before the first run."""
        if self.sparse_trainer is None or self.metrics is None:
            return {}
        return {
            "trainer": self.sparse_trainer.state_dict(),
            "metrics": self.metrics.state_dict(),
            "recipes": to_plain(recipes_of(self.sparse_trainer.model)),
        }

    def poll(self) -> bool:
        """Whether the masks were updated since the last call."""
        return self.metrics is not None and self.metrics.poll()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sparse_trainer": None, "metrics": None}


def _name(method: Callable[..., Trainer]) -> str:
    return getattr(method, "__name__", type(method).__name__)
