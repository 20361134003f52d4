"""Does a learned permutation of each layer's inputs help, and when is it decided?

Trains a small perceptron on scikit-learn's digits, sparse by SET with a constant fan-in or in blocks of 4 x 4, without
a permutation, with a random one that stays, and with one that is learned (``LearnedPermutations``). Run it with
``.venv/bin/python examples/learned_permutations.py``; it takes some minutes of one core, needs scikit-learn, and prints
the table of ``docs/methods.md`` after a line for each run. Test images are looked at once, at the end of a run.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.demo.data import Split, digits
from srigl_fx.masks.records import sparse_weights
from srigl_fx.nn.permuted import settle

Permutation = Literal["none", "random", "learned"]
Form = Literal["constant fan-in", "blocks of 4 x 4"]
FORMS: tuple[Form, ...] = ("constant fan-in", "blocks of 4 x 4")
PERMUTATIONS: tuple[Permutation, ...] = ("none", "random", "learned")
STEPS, BATCH, LEARNING_RATE = 800, 64, 2e-3
PENALTY = 1e-2  # with 1e-3 the permutation of 256 inputs is not decided within 1500 steps


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run.

    Attributes:
        score: Accuracy on the test images, in percent.
        hardened: The step at which each layer's permutation was decided.
        forced: Layers whose permutation was decided only because the training was over.
        seconds: The processor time that the training took.
    """

    score: float
    hardened: tuple[int, ...] = ()
    forced: int = 0
    seconds: float


def build(form: Form, sparsity: float, seed: int) -> nn.Module:
    """A sparse perceptron; the last layer is dense."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    blocks = form == "blocks of 4 x 4"
    return sx.sparsify(
        model,
        sparsity=sparsity,
        distribution="uniform",
        structure="block" if blocks else "constant_fan_in",
        group_size=4 if blocks else 1,
        block_width=4 if blocks else 1,
        rules={"4": None},
        seed=seed,
    )


def train(form: Form, permutation: Permutation, sparsity: float, seed: int, split: Split, steps: int) -> Result:
    """Train one network and test it."""
    model = build(form, sparsity, seed)
    generator = torch.Generator().manual_seed(seed)
    if permutation == "random":
        for handle in sparse_weights(model):
            settle(handle.owner, torch.randperm(handle.weight.shape[1], generator=generator))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    trainer = sx.SET(model, optimizer, total_steps=steps, update_every=max(1, steps // 60), seed=seed)
    learned = sx.LearnedPermutations(model, optimizer, penalty=PENALTY, seed=seed) if permutation == "learned" else None
    order = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(steps):
        chosen = torch.randint(len(split.train_x), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(split.train_x[chosen].flatten(1)), split.train_y[chosen])
        if learned is not None:
            loss = loss + learned.penalty()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    trainer.detach()
    forced = 0
    if learned is not None:
        forced = len(learned.harden())
    with torch.no_grad():
        score = 100 * float((model.eval()(split.test_x.flatten(1)).argmax(1) == split.test_y).float().mean())
    hardened = () if learned is None else tuple(how.step for how in learned.hardened.values())
    return Result(score=score, hardened=hardened, forced=forced, seconds=seconds)


def table(found: dict[tuple[float, Form, Permutation], list[Result]], steps: int) -> str:
    """A Markdown table: a row for each sparsity, form and kind of permutation."""
    lines = [
        "| sparsity | kept weights | permutation | accuracy, % | decided at step | processor ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for (sparsity, form, permutation), results in found.items():
        scores = [result.score for result in results]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        at = [step for result in results for step in result.hardened]
        decided = f"{min(at)} to {max(at)}" if at else ""
        if forced := sum(result.forced for result in results):
            decided += f" ({forced} of {len(at)} at the end of the training)"
        per_step = 1e3 * statistics.mean(result.seconds for result in results) / steps
        cells = (
            f"{sparsity:.0%}",
            form,
            permutation,
            f"{statistics.mean(scores):.1f} ± {spread:.1f}",
            decided,
            f"{per_step:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9])
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    split = digits()
    found: dict[tuple[float, Form, Permutation], list[Result]] = {}
    for sparsity in options.sparsities:
        for form in FORMS:
            for permutation in PERMUTATIONS:
                for seed in range(options.seeds):
                    result = train(form, permutation, sparsity, seed, split, options.steps)
                    found.setdefault((sparsity, form, permutation), []).append(result)
                    print(f"{sparsity:.0%}, {form}, {permutation}, seed {seed}: {result}", flush=True)
    print(table(found, options.steps))


if __name__ == "__main__":
    main()
