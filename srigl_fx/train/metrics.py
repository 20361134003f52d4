"""What a training run looks like from its masks: numbers for loggers and progress bars, for each layer and in total.

Owns :class:`MaskMetrics`, which looks at the masks when they have changed and at no other time. It must not know
loggers, frameworks or how masks are chosen, and it hooks into nothing: whoever runs the loop calls
:meth:`MaskMetrics.poll`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import SparseWeight, plain, sparse_weights
from srigl_fx.train.base import Trainer

STATE_VERSION = 1

Numbers = dict[str, float]
_Bits = NDArray[np.uint8]


@dataclass
class _Layer:
    """Counts for one weight, or their sums over several; masks are kept as packed bits.

    Attributes:
        size: Entries of the dense weight.
        neurons: Its rows.
        active: Entries in the mask.
        active_neurons: Rows with an entry in the mask.
        ever: Entries that have been in the mask at any time.
        before: Entries that were in the mask before the last update.
        replaced: How many of those left it.
    """

    size: int = 0
    neurons: int = 0
    active: int = 0
    active_neurons: int = 0
    ever: int = 0
    before: int = 0
    replaced: int = 0

    def numbers(self) -> Numbers:
        return {
            "sparsity": 1 - self.active / self.size,
            "fan_in": self.active / max(1, self.active_neurons),
            "active_neurons": self.active_neurons,
            "active_share": self.active_neurons / self.neurons,
            "itop": self.ever / self.size,
            "change_rate": self.replaced / max(1, self.before),
        }


class MaskMetrics:
    """Sparsity, fan-in, active neurons, ITOP rate and mask change rate of a run.

    The masks are read when the trainer has updated them; an ordinary step costs one comparison and waits for no
    device. Memory: two bits for each masked weight, on the host.

    ========================  =======================================================================================
    ``sparsity``              share of the entries that are not in the mask
    ``fan_in``                connections of an active neuron: the fan-in where it is constant, else the mean
    ``active_neurons``        neurons with at least one connection
    ``active_share``          the same, as a share of all neurons
    ``itop``                  in-time over-parameterisation rate: share of the entries that have been in the mask at
                              any time since this object was made
    ``change_rate``           share of the entries in the mask that the last update took out of it
    ========================  =======================================================================================

    Totals are over the masked weights, each entry (for ``fan_in`` and ``active_share`` each neuron) counted once.

    Args:
        trainer: The attached training method.

    Attributes:
        step: The step of the last update that was seen, None before the first.

    Source: ITOP: "Do we actually need dense over-parameterization?" (Liu et al., ICML 2021).

    Example:
        >>> import srigl_fx as sx
        >>> from torch import nn
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> metrics = MaskMetrics(sx.SRigL(model, optimizer, total_steps=100, update_every=5, ablation=None))
        >>> for _ in range(5):
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        ...     if metrics.poll():
        ...         print(metrics.step, metrics.postfix()["neurons"], list(metrics.layers()))
        5 100.0% ['0.weight', '2.weight']
    """

    def __init__(self, trainer: Trainer) -> None:
        """Remember the masks as they are now: the ITOP rate starts at their density."""
        self._trainer = trainer
        self.step = self._told = trainer.last_update
        self._layers: dict[str, _Layer] = {}
        self._active: dict[str, _Bits] = {}
        self._ever: dict[str, _Bits] = {}
        self._read()

    @property
    def trainer(self) -> Trainer:
        """The training method that is watched."""
        return self._trainer

    def poll(self) -> bool:
        """Take note of the masks if the trainer has updated them since the last call, and say whether it has.

        To be called after every ``optimizer.step()``: of several updates between two calls only the last is seen.
        """
        self._catch_up()
        changed = self._told != self.step
        self._told = self.step
        return changed

    def layers(self) -> dict[str, Numbers]:
        """The numbers of each masked weight, by its name, as of the last update."""
        return {name: layer.numbers() for name, layer in self._layers.items()}

    def total(self) -> Numbers:
        """The numbers of all masked weights together."""
        fields = vars(_Layer())
        return _Layer(**{name: sum(vars(layer)[name] for layer in self._layers.values()) for name in fields}).numbers()

    def flat(self, *, layers: bool = True) -> Numbers:
        """All numbers under names for loggers: ``<number>/total`` and, if wanted, ``<number>/<weight>``."""
        named = {"total": self.total(), **(self.layers() if layers else {})}
        return {f"{number}/{name}": value for name, numbers in named.items() for number, value in numbers.items()}

    def postfix(self) -> dict[str, str]:
        """The totals as short texts, for ``tqdm``'s ``bar.set_postfix(metrics.postfix())``."""
        total = self.total()
        shares = {"sparsity": "sparsity", "neurons": "active_share", "itop": "itop", "changed": "change_rate"}
        return {name: f"{total[number]:.1%}" for name, number in shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, made of plain values and tensors; the masks are read first if they have changed."""
        self._catch_up()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "layers": {
                name: {
                    "active": torch.from_numpy(self._active[name].copy()),
                    "ever": torch.from_numpy(self._ever[name].copy()),
                    "before": layer.before,
                    "replaced": layer.replaced,
                }
                for name, layer in self._layers.items()
            },
        }

    def check_state_dict(self, state: Any) -> None:
        """Raise what :meth:`load_state_dict` would raise for ``state``; nothing is changed."""
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise TrainerError(f"this is no state of MaskMetrics (version {STATE_VERSION}): load another checkpoint")
        layers = state.get("layers")
        if "step" not in state or not isinstance(layers, dict) or layers.keys() != self._layers.keys():
            raise TrainerError("the metrics' state is damaged or of another model: only one masks some of the weights")
        for handle in sparse_weights(self._trainer.model):
            name, saved = plain(handle.fqn), layers[plain(handle.fqn)]
            active = _pack(handle)
            bits = [saved.get(key) if isinstance(saved, dict) else None for key in ("active", "ever")]
            if not all(isinstance(part, torch.Tensor) and part.shape == active.shape for part in bits):
                raise TrainerError(f"the metrics' state of {name} is damaged; load another checkpoint")
            if not np.array_equal(saved["active"].cpu().numpy(), active):
                raise TrainerError(
                    f"{name} has another mask than when the metrics were saved: load the model of the same checkpoint "
                    "first"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, once model and trainer have loaded theirs.

        Raises:
            TrainerError: The state is damaged, of another model, or was saved with other masks; nothing is changed.
        """
        self.check_state_dict(state)
        self.step = self._told = state["step"]
        self._ever = {name: saved["ever"].cpu().numpy().copy() for name, saved in state["layers"].items()}
        self._read()
        for name, saved in state["layers"].items():
            self._layers[name].before, self._layers[name].replaced = saved["before"], saved["replaced"]

    def _catch_up(self) -> None:
        if self._trainer.last_update != self.step:
            self.step = self._trainer.last_update
            self._read()

    def _read(self) -> None:
        for handle in sparse_weights(self._trainer.model):
            name, active = plain(handle.fqn), _pack(handle)
            previous = self._active.get(name, active)
            self._active[name], self._ever[name] = active, self._ever.get(name, active) | active
            rows, columns = handle.record.site.matrix_shape
            self._layers[name] = _Layer(
                size=rows * columns,
                neurons=rows,
                active=_count(active),
                active_neurons=int(handle.record.site.to_matrix(handle.mask).any(dim=1).sum()),
                ever=_count(self._ever[name]),
                before=_count(previous),
                replaced=_count(previous & ~active),
            )


def _pack(handle: SparseWeight) -> _Bits:
    """The mask's bits, eight a byte, on the host."""
    return np.packbits(handle.mask.cpu().numpy())


def _count(bits: _Bits) -> int:
    return int(np.bitwise_count(bits).sum())
