"""Whole networks, 90 % sparse: the dense file in ONNX Runtime, ours in torch and in ONNX Runtime, and DeepSparse.

Owns the networks, their files and their contenders. Weights are random, as speed does not depend on them.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import srigl_fx as sx
from harness.cells import DEEPSPARSE, DEEPSPARSE_ORT, ORT_DENSE, OURS_ORT, OURS_TORCH, Record
from harness.contenders import difference, ort_session
from harness.deepsparse_process import PeerError
from harness.measuring import Bench, remote_timers
from harness.timing import Timer, interleaved, timer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPARSITY = 0.9
TOLERANCE = 1e-3  # of the largest output, through a whole network


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and how its inputs are made."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


class Logits(nn.Module):
    """A classifier of transformers as a function of tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def networks(*, tiny: bool = False) -> dict[str, Network]:
    """The networks; with ``tiny``, one small one."""
    import transformers as hf

    def pictures(size: int) -> Callable[[int], dict[str, Tensor]]:
        return lambda batch: {"pixel_values": torch.randn(batch, 3, size, size)}

    if tiny:
        small = hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
        return {"ResNet, tiny": Network(build=lambda: hf.ResNetForImageClassification(small), inputs=pictures(32))}
    classes: dict[str, Any] = {"num_labels": 1000}
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # what the old exporter can say
    return {
        "ResNet-50, 224 px": Network(
            build=lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**classes)), inputs=pictures(224)
        ),
        "ViT-B/16, 224 px": Network(
            build=lambda: hf.ViTForImageClassification(hf.ViTConfig(**classes, **eager)), inputs=pictures(224)
        ),
        "BERT-base, 128 tokens": Network(
            build=lambda: hf.BertForSequenceClassification(hf.BertConfig(**eager)),
            inputs=lambda batch: {"input_ids": torch.randint(0, 30000, (batch, 128))},
        ),
    }


def measure_networks(
    folder: Path, batches: Sequence[int], bench: Bench, *, tiny: bool = False
) -> Iterator[list[Record]]:
    """Measure every network at every batch size; files go to ``folder``."""
    torch.set_num_threads(bench.threads)
    for name, network in networks(tiny=tiny).items():
        for batch in batches:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporters
                yield _measure(folder, name, network, batch, bench)


def _measure(folder: Path, name: str, network: Network, batch: int, bench: Bench) -> list[Record]:
    inputs = network.inputs(batch)
    model = Logits(network.build(), tuple(inputs)).eval()
    twin = copy.deepcopy(model)
    sx.sparsify(model, sparsity=SPARSITY, distribution="uniform", mask_init="random")
    state = twin.state_dict()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if key in state})
    args = tuple(inputs.values())
    dense_file, sparse_file = folder / "dense.onnx", folder / "sparse.onnx"
    export_dense(twin, args, tuple(inputs), dense_file)
    lowered = sx.lower(model, args, min_speedup=0, verify=False)
    sx.export_onnx(lowered, sparse_file, args, verify=False, min_speedup=0)
    dense, sparse = (
        ort_session(str(dense_file), bench.threads),
        ort_session(str(sparse_file), bench.threads, library=True),
    )
    arrays = [tensor.numpy() for tensor in args]
    feeds = {
        session: {port.name: array for port, array in zip(session.get_inputs(), arrays, strict=True)}
        for session in (dense, sparse)
    }
    with torch.inference_mode():
        expected = twin(*args)
        calls: dict[str, Callable[[], Any]] = {
            ORT_DENSE: lambda: dense.run(None, feeds[dense])[0],
            OURS_TORCH: lambda: lowered(*args),
            OURS_ORT: lambda: sparse.run(None, feeds[sparse])[0],
        }
        missing: dict[str, str] = {}
        timers: dict[str, Timer] = {}
        for contender, call in calls.items():
            problem = difference(call(), expected, TOLERANCE)
            if problem:
                missing[contender] = f"wrong: {problem}"
            else:
                timers[contender] = timer(call)
        remote = (DEEPSPARSE, DEEPSPARSE_ORT)
        try:
            timers |= remote_timers(remote, bench, dense_file, feeds[dense], expected, TOLERANCE)
        except PeerError as error:
            missing |= dict.fromkeys(remote, str(error))
        times = interleaved(timers, seconds=10 * bench.effort.seconds, rounds=bench.effort.rounds)
    return [
        Record(
            section="models",
            layer=name,
            sparsity=SPARSITY,
            batch=batch,
            threads=bench.threads,
            contender=contender,
            microseconds=1e6 * times.get(contender, float("nan")),
            note=missing.get(contender, ""),
        )
        for contender in (*calls, *remote)
    ]


def export_dense(model: nn.Module, args: tuple[Tensor, ...], names: tuple[str, ...], path: Path) -> None:
    """The dense file, zeros in place, at opset 13 and IR 8: the newest that DeepSparse 1.8 reads."""
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model, args, path, dynamo=False, opset_version=13, input_names=list(names), output_names=["logits"]
    )
    proto = onnx.load(path)
    proto.ir_version = 8
    onnx.save(proto, path)
