"""What the training tests share: small models, batches, an ordinary loop and what can be seen of hooks and masks."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srigl_fx import sparsify
from srigl_fx.masks.records import Structure, sparse_weights
from srigl_fx.train import SRigL


def mlp(sparsity: float = 0.75, structure: Structure = "constant_fan_in") -> nn.Sequential:
    """24 inputs, two hidden layers of 32, 4 outputs; sparse."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return sparsify(model, sparsity=sparsity, distribution="uniform", structure=structure)


class SmallNet(nn.Module):
    """Most kinds of weight on inputs (N, 3, 4, 4): convolutions plain, grouped and transposed, attention, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 160), nn.GELU(), nn.Linear(160, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.grouped(x).relu())
        tokens = x.reshape(x.shape[0], -1, 32)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head((tokens + self.mlp(tokens)).mean(1))
        return logits


def batches(count: int, shape: tuple[int, ...] = (16, 24), *, seed: int = 0) -> Iterator[Tensor]:
    """``count`` random inputs; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(shape, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Squared error of outputs that should all be 1.5 or 0.5: the sign of the sum of the input's first half."""
    y: Tensor = model(x)
    positive = x.flatten(1).float().chunk(2, dim=1)[0].sum(1, keepdim=True) > 0
    loss = F.mse_loss(y.float(), (positive + 0.5).expand_as(y)) * y.shape[1]
    return loss


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Tensor], check: Callable[[], None] | None = None
) -> None:
    """An ordinary loop; ``check`` is called after each step."""
    for x in data:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        if check is not None:
            check()


def srigl_run(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
    """The same small network, optimizer and trainer each time; SRigL ablates within the first updates."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    usual = {"total_steps": 60, "update_every": 5, "ablation": 0.9, "drop_fraction": 0.5}
    return model, optimizer, SRigL(model, optimizer, **{**usual, **options})


def through_a_file(state: Any) -> Any:
    """What ``torch.save`` wrote of a state and ``torch.load`` reads without running any of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def dense_at_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> dict[str, Tensor]:
    """Train on all batches; the dense gradients of the last one, by the weight's name."""
    train(model, optimizer, data[:-1])
    optimizer.zero_grad()
    dense = dense_gradient_sums(model)
    torch.autograd.backward(loss_of(model, data[-1]))
    optimizer.step()
    return dense


def mask_copies(model: nn.Module) -> dict[str, Tensor]:
    """The masks as they are now, by the weight's name."""
    return {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of masks are equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def hook_count(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Hooks on the parameters' gradients and on the optimizer's steps."""
    on_parameters = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return on_parameters + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def dense_gradient_sums(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the masked weights from now on, summed as autograd delivers them, before anything masks them."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, weight: nn.Parameter) -> None:
        def add(grad: Tensor) -> None:
            sums[name] = sums[name] + grad if name in sums else grad.clone()

        weight.register_hook(add)  # type: ignore[no-untyped-call]

    for handle in sparse_weights(model):
        watch(handle.fqn, handle.weight)
    return sums
