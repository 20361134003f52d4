"""The training step: a sparse multilayer perceptron that computes with its kept weights alone, and its dense twin.

Owns the two steps and their timing. The sparse step is built on the gradients of the condensed operator; the dense one
is what masked training costs, before it masks anything.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from harness.cells import DENSE_STEP, SPARSE_STEP, Record
from harness.layers import Layer, random_weight
from harness.measuring import Bench
from harness.timing import interleaved, timer


def dense_step(widths: tuple[int, ...], x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """Forward, backward and one step of SGD with momentum, with torch's own layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return _step(lambda: model(x), list(model.parameters()), target)


def sparse_step(widths: tuple[int, ...], sparsity: float, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """The same with condensed weights: gradients of the input, of the kept weights and of the bias."""
    linear = torch.ops.srigl_fx.condensed_linear.default
    weights = []
    for inputs, outputs in itertools.pairwise(widths):
        weight = random_weight(Layer(inputs=inputs, outputs=outputs), sparsity)
        operands = [torch.from_numpy(getattr(weight, name)) for name in ("values", "indices", "active", "bias")]
        operands[0].requires_grad_()
        operands[3].requires_grad_()
        weights.append((inputs, operands))

    def forward() -> Tensor:
        y = x
        for position, (inputs, operands) in enumerate(weights):
            y = linear(functional.relu(y) if position else y, *operands, inputs)
        return y

    return _step(forward, [operands[i] for _, operands in weights for i in (0, 3)], target)


def _step(forward: Callable[[], Tensor], parameters: list[Tensor], target: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.mse_loss(forward(), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure_steps(widths: tuple[int, ...], sparsity: float, batch: int, bench: Bench) -> list[Record]:
    """Both steps of one perceptron, in turns."""
    torch.set_num_threads(bench.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, widths[0], generator=generator)
    target = torch.randn(batch, widths[-1], generator=generator)
    steps = {DENSE_STEP: dense_step(widths, x, target), SPARSE_STEP: sparse_step(widths, sparsity, x, target)}
    times = interleaved(
        {name: timer(step) for name, step in steps.items()},
        seconds=5 * bench.effort.seconds,
        rounds=bench.effort.rounds,
    )
    return [
        Record(
            section="train",
            layer="MLP " + "-".join(map(str, widths)),
            sparsity=sparsity,
            batch=batch,
            threads=bench.threads,
            contender=name,
            microseconds=1e6 * seconds,
        )
        for name, seconds in times.items()
    ]
