"""ResNet-50 at 90 % and several batch sizes, in ONNX Runtime: rows by themselves and rows that share inputs.

Whole networks with random weights, as speed does not depend on them, uniformly sparse, beside the dense network in ONNX
Runtime and OpenVINO and beside DeepSparse, all of them in turns. Blocks of 8 samples, or 16 with AVX-512, lie
innermost; 15 and 17 show what a rest costs. For two threads nothing else may run.

    python benchmarks/image_batches.py [--batches 1 8 15 16 17 32] [--groups 1 4] [--threads 1] [--seconds 6]

Prints a Markdown page: benchmarks/results/image_batches.md. DeepSparse needs an environment of its own:
``python benchmarks/peers.py --setup-deepsparse``.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from harness import deepsparse_process, machine
from harness.contenders import ort_session
from harness.models import SPARSITY, Logits, export_dense, networks
from harness.openvino_calls import NotAvailableError, openvino_call
from harness.timing import Timer, interleaved, timer

import srigl_fx as sx

DENSE = ("dense, ONNX Runtime", "dense, OpenVINO")
PEER = "DeepSparse"


def files(folder: Path, group_size: int, batch: int) -> tuple[Path, Path, torch.Tensor]:
    """The network as a dense file that holds its zeros, and condensed, and what it is called with."""
    network = networks()["ResNet-50, 224 px"]
    torch.manual_seed(0)
    inputs = network.inputs(batch)
    model, args = Logits(network.build(), tuple(inputs)).eval(), tuple(inputs.values())
    twin = copy.deepcopy(model)
    options = {"group_size": group_size} if group_size > 1 else {}
    sx.sparsify(model, sparsity=SPARSITY, distribution="uniform", mask_init="random", **options)
    state = twin.state_dict()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if key in state})
    dense, sparse = folder / f"dense_{group_size}.onnx", folder / f"sparse_{group_size}.onnx"
    export_dense(twin, args, tuple(inputs), dense)
    # Any batch may be called; from 16 samples on the file is the same, and with fewer the comparison is cheaper.
    sx.export_onnx(model, sparse, (args[0][:16],), min_speedup=0)  # and compared with the model
    return dense, sparse, args[0]


def measure(batch: int, options: argparse.Namespace) -> dict[str, float]:
    """The median milliseconds of one call of each contender."""
    timers: dict[str, Timer] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters
        for group_size in options.groups:
            dense, sparse, x = files(Path(folder), group_size, batch)
            feeds = {"pixel_values": x.numpy()}
            for name, path, library in ((DENSE[0], dense, False), (f"g = {group_size}", sparse, True)):
                if name not in timers:
                    session = ort_session(str(path), options.threads, library=library)
                    given = {session.get_inputs()[0].name: x.numpy()}
                    timers[name] = timer(lambda session=session, given=given: session.run(None, given))
            if group_size != options.groups[0]:
                continue
            try:
                timers[DENSE[1]] = timer(openvino_call(dense.read_bytes(), feeds, options.threads))
                worker = stack.enter_context(deepsparse_process.Worker(options.peers))
                worker.load(dense, feeds, threads=options.threads)
                timers[PEER] = worker.timer("deepsparse")
            except (NotAvailableError, deepsparse_process.PeerError) as error:
                print(error, file=sys.stderr)
        times = interleaved(timers, seconds=options.seconds, rounds=options.rounds)
    return {name: 1e3 * seconds for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 15, 16, 17, 32])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each contender and batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=Path, default=deepsparse_process.default_folder())
    options = parser.parse_args()
    ours = [f"g = {size}" for size in options.groups]
    names = [*DENSE, PEER, *ours]
    ratios = [f"{one} over {other}" for one in ours for other in ("dense", PEER)]
    print(f"# ResNet-50 by batch sizes\n\n{machine.describe(options.threads)}\n")
    print("ResNet-50, 224 px, 90 % sparse, uniformly; milliseconds a call, medians of contenders that took turns. g is")
    print("the size of the groups of rows that share inputs. Dense is the fastest of its columns.\n")
    print(f"| batch | {' | '.join([*names, *ratios])} |")
    print("|---" * (1 + len(names) + len(ratios)) + "|")
    for batch in options.batches:
        times = measure(batch, options)
        dense = min(times[name] for name in DENSE if name in times)
        cells = [f"{times[name]:.0f}" if name in times else "-" for name in names]
        for one in ours:
            cells += [f"{dense / times[one]:.2f}x", f"{times[PEER] / times[one]:.2f}x" if PEER in times else "-"]
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
