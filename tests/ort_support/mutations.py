"""Models that are wrong, at random or on purpose, and what becomes of them in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx

from ort_support import malformed
from ort_support.models import Array, Node, conv, linear
from srigl_fx.runtime.ort.fallback import SHARED

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)
SAMPLES = {2: (3, 10), 4: (1, 4, 5, 6)}  # what the well-formed nodes take, by rank


def shared(node: Node) -> Node:
    """The node with two rows of indices, which its four rows share."""
    w = node.weights
    active = np.stack([w["active"], np.array([0, 0, 1, 1], np.int32)])
    return node.with_weights(indices=w["indices"][:2].copy(), active=active).replace(used=(SHARED,))


def attempt(folder: Path, library: Path) -> dict[str, dict[str, str]]:
    """The outcome of every model in the folder.

    Raises:
        AssertionError: The process crashed.
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", malformed.__file__, str(library), str(folder)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"crashed at {lines[-1]['model']}: {done.stderr[-2000:]}"
    return {line["model"]: line for line in lines if "stage" in line}


def write(folder: Path, name: str, model: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    """A model for :func:`attempt`, and what it is fed."""
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / f"{name}.npz", **feeds)  # type: ignore[arg-type]


def _mutate(rng: np.random.Generator, node: Node) -> Node:
    """One to three random changes, of a kind that a bit flip or an attacker would make."""
    extremes = (0, 1, -1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, INT64_MAX, INT64_MIN)
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.5:
            name = str(rng.choice(list(node.attributes)))
            value = node.attributes[name]
            new = int(rng.choice(np.array(extremes, object)))
            if isinstance(value, list):
                value = list(value)
                value[rng.integers(len(value))] = new
                node = node.with_attributes(**{name: value})
            else:
                node = node.with_attributes(**{name: new})
            continue
        name = str(rng.choice(list(node.weights)))
        array = node.weights[name].copy()
        kind = rng.integers(4)
        if kind == 0 and array.size:
            raw = array.reshape(-1).view(np.uint8)
            raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
        elif kind == 1 and array.ndim:
            array = array[: rng.integers(array.shape[0] + 1)].copy()
        elif kind == 2:
            array = np.concatenate([array, array]) if array.ndim else array
        else:
            array = array.reshape(-1) if rng.random() < 0.5 else array[None]
        node = node.with_weights(**{name: array})
    return node


def mutated(count: int, seed: int, eight_bits: bool) -> dict[str, Node]:
    """So many random changes of well-formed nodes, by name."""
    rng = np.random.default_rng(seed)
    nodes: dict[str, Node] = {}
    for i in range(count):
        index_type = ("uint16", "int32")[i % 2]
        node = linear(index_type=index_type) if i % 4 < 2 else conv(index_type=index_type, pads=[1, 0, 0, 1])
        node = shared(node) if i % 3 == 0 else node
        changed = _mutate(rng, node.of_eight_bits() if eight_bits else node)
        constant = rng.random() < 0.7
        nodes[f"case{i}"] = changed if constant else changed.replace(not_constant=frozenset({"indices", "active"}))
    return nodes
