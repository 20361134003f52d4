"""What a server gives under load: dense, dense int8, sparse and sparse int8 files of one encoder, over HTTP.

Four layers of BERT-base's size with a classifier, 64 tokens a request, random weights: speed does not depend on them.
Each file has a server of its own (``srigl-fx serve``, one thread a call, up to 16 requests a call); all are
up, and clients ask one after another of them, in turns: 1, 8 or 32 clients, each of which asks again once it has an
answer. Servers run on the first processor, clients on the second. Rates and percentiles are medians of the turns.

    pip install aiohttp
    python benchmarks/serving_load.py

Prints a Markdown page: benchmarks/results/serving_load.md. About six minutes.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import numpy as np
import torch
import transformers
from harness.machine import describe
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.demo.dense_int8 import dynamic_int8

SERVER = (sys.executable, "-c", "from srigl_fx.cli import main; main()", "serve")
TOKENS, VOCABULARY, SPARSITY = 64, 1000, 0.9
CLIENTS = (1, 8, 32)
FILES = ("dense", "dense int8", "sparse", "sparse int8")


class Classifier(nn.Module):
    """Logits of a BERT."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        self.model = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits


def make_files(folder: Path, layers: int, width: int) -> dict[str, Path]:
    """The four files of one network."""
    torch.manual_seed(0)
    rules = {"*embeddings*": None, "*classifier*": None, "*pooler*": None}
    model = sx.sparsify(Classifier(layers, width), sparsity=SPARSITY, distribution="uniform", rules=rules).eval()
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    paths = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in FILES}
    sx.export_onnx(model, paths["sparse"], (ids,), min_speedup=0)
    sx.export_onnx(model, paths["sparse int8"], (ids,), min_speedup=0, value_dtype=torch.int8)
    sx.onnx_tools.densify(paths["sparse"], paths["dense"])
    paths["dense int8"].write_bytes(dynamic_int8(paths["dense"].read_bytes()))
    return paths


def start(stack: ExitStack, path: Path, cpus: set[int]) -> str:
    """A server of the file; its address, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([*SERVER, str(path), "--port", str(port)])
    stack.callback(server.wait)
    stack.callback(server.terminate)
    os.sched_setaffinity(server.pid, cpus)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return url
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server of {path} does not answer")


async def load(url: str, clients: int, seconds: float, bodies: list[bytes]) -> list[float]:
    """The seconds of each request of so many clients."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while time.perf_counter() < end:
            begin = time.perf_counter()
            number += 1
            async with session.post(f"{url}/predict", data=bodies[number % len(bodies)]) as answer:
                await answer.read()
                assert answer.status == 200, await answer.text()
            taken.append(time.perf_counter() - begin)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, 7 * number) for number in range(clients)))
    return taken


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of a turn (default 6)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each file (default 5)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and short turns, to see that all runs")
    options = parser.parse_args()
    layers, width = (1, 64) if options.quick else (4, 768)
    seconds, rounds = (0.2, 1) if options.quick else (options.seconds, options.rounds)
    rng = np.random.default_rng(0)
    bodies = [
        json.dumps({"inputs": {"input_ids": rng.integers(0, VOCABULARY, (1, TOKENS)).tolist()}}).encode()
        for _ in range(16)
    ]
    processors = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        paths = make_files(Path(stack.enter_context(tempfile.TemporaryDirectory())), layers, width)
        urls = {name: start(stack, path, {processors[0]}) for name, path in paths.items()}
        os.sched_setaffinity(0, {processors[-1]})
        print("# Serving under load\n")
        print("`benchmarks/serving_load.py` says what is compared, and prints this page.\n")
        print(f"{layers} layers of width {width}, {TOKENS} tokens a request, sparsity {SPARSITY:.0%}. {describe(1)}\n")
        print("| clients | file | requests a second | over dense int8 | p50, ms | p99, ms |")
        print("|---|---|---|---|---|---|")
        for clients in CLIENTS:
            turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in FILES}
            for number in range(rounds + 1):
                for name in FILES:
                    taken = asyncio.run(load(urls[name], clients, seconds, bodies))
                    if number:  # the first round warms up
                        percentiles = np.percentile(taken, (50, 99)) * 1e3
                        turns[name].append((len(taken) / seconds, *percentiles))
            medians = {
                name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in turns.items()
            }
            for name, (rate, p50, p99) in medians.items():
                ratio = rate / medians["dense int8"][0]
                print(f"| {clients} | {name} | {rate:.1f} | {ratio:.2f}x | {p50:.1f} | {p99:.1f} |", flush=True)
        print(
            "\nBytes of the files: "
            + ", ".join(f"{name} {path.stat().st_size:,}" for name, path in paths.items())
            + "."
        )


if __name__ == "__main__":
    main()
