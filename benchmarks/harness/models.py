"""Whole networks, 90 % sparse: dense files in float32 and int8, ours in torch and in ONNX Runtime, and DeepSparse.

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
from harness.cells import (
    DEEPSPARSE,
    DEEPSPARSE_ORT,
    DENSE_INT8,
    OPENVINO_DENSE,
    OPENVINO_INT8,
    ORT_DENSE,
    ORT_INT8,
    OURS_INT8,
    OURS_ORT,
    OURS_ORT_INT8,
    OURS_TORCH,
    OURS_TORCH_INT8,
    Record,
)
from harness.contenders import difference, ort_session
from harness.deepsparse_process import PeerError
from harness.measuring import Bench, remote_timers
from harness.openvino_calls import NotAvailableError, openvino_call
from harness.timing import Timer, interleaved, timer
from srigl_fx.demo.dense_int8 import dynamic_int8, static_int8

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPARSITY = 0.9
TOLERANCE = 1e-3  # of the largest output, through a whole network
INT8_TOLERANCE = 0.5  # the same: random weights carry rounding on, which only a trained network damps


CONTENDERS = (ORT_DENSE, OPENVINO_DENSE, *DENSE_INT8, OURS_TORCH, OURS_ORT, *OURS_INT8)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and how its inputs are made."""

    build: Callable[[], nn.Module]
    convolutional: bool = False  # then int8 has static scales: dense, as ONNX Runtime's guide says, and ours
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
        return {
            "ResNet, tiny": Network(
                build=lambda: hf.ResNetForImageClassification(small), inputs=pictures(32), convolutional=True
            )
        }
    classes: dict[str, Any] = {"num_labels": 1000}
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # what the old exporter can say
    return {
        "ResNet-50, 224 px": Network(
            build=lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**classes)),
            inputs=pictures(224),
            convolutional=True,
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
    dense_file = folder / "dense.onnx"
    export_dense(twin, args, tuple(inputs), dense_file)
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    dense, made = dense_file.read_bytes(), {}
    made[ORT_DENSE] = _session_call(dense_file, args, bench.threads)
    missing: dict[str, str] = {}
    rounded = static_int8(dense, given) if network.convolutional else dynamic_int8(dense)
    rounded_file = folder / "dense_int8.onnx"
    rounded_file.write_bytes(rounded)
    made[ORT_INT8] = _session_call(rounded_file, args, bench.threads)
    for contender, source in ((OPENVINO_DENSE, dense), (OPENVINO_INT8, rounded)):
        try:
            made[contender] = openvino_call(source, given, bench.threads)
        except NotAvailableError as error:
            missing[contender] = str(error)
    for in_torch, in_ort, dtype in (
        (OURS_TORCH, OURS_ORT, torch.float32),
        (OURS_TORCH_INT8, OURS_ORT_INT8, torch.int8),
    ):
        file = folder / f"sparse_{dtype.itemsize}.onnx"
        # As its rival's, the scales of a convolutional network are those of one batch.
        calibration = [args] if network.convolutional and dtype is torch.int8 else None
        lowered = sx.lower(model, args, min_speedup=0, verify=False, value_dtype=dtype, calibration=calibration)
        sx.export_onnx(lowered, file, args, verify=False, min_speedup=0)
        made[in_torch] = lambda lowered=lowered: lowered(*args)
        made[in_ort] = _session_call(file, args, bench.threads, library=True)
    with torch.inference_mode():
        expected = twin(*args)
        calls = {name: made[name] for name in CONTENDERS if name in made}
        timers: dict[str, Timer] = {}
        for contender, call in calls.items():
            eight_bits = contender in (*DENSE_INT8, *OURS_INT8)
            problem = difference(call(), expected, INT8_TOLERANCE if eight_bits else TOLERANCE)
            if problem:
                missing[contender] = f"wrong: {problem}"
            else:
                timers[contender] = timer(call)
        remote = (DEEPSPARSE, DEEPSPARSE_ORT)
        try:
            timers |= remote_timers(remote, bench, dense_file, given, expected, TOLERANCE)
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
        for contender in (*CONTENDERS, *remote)
    ]


def _session_call(path: Path, args: tuple[Tensor, ...], threads: int, *, library: bool = False) -> Callable[[], Any]:
    session = ort_session(str(path), threads, library=library)
    feeds = {port.name: tensor.numpy() for port, tensor in zip(session.get_inputs(), args, strict=True)}
    return lambda: session.run(None, feeds)[0]


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
