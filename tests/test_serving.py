"""``srigl-fx serve``, over real sockets: what it answers, what runs together, what it refuses, and how it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import uvicorn
from cli_support import assert_readable_error, assert_wrong_usage, run
from condensing_support import pruned, random
from fastapi import HTTPException
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.errors import FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.serving.arrays import _array, arrays, listed
from srigl_fx.serving.batcher import Batcher
from srigl_fx.serving.http import make_app

WEIGHT = pruned(48, 48)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A condensed file from ``x`` (batch, length, 48) to ``y`` of as many sizes."""
    folder = tmp_path_factory.mktemp("served")
    sizes: list[str | int | None] = ["batch", "length", 48]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [numpy_helper.from_array(np.ascontiguousarray(WEIGHT.T), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "a.onnx")
    return condense_onnx(folder / "a.onnx", folder / "b.onnx", min_speedup=0).path


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    app = make_app(path, max_batch=8, max_waiting=32)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def ask(url: str, body: bytes | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def predicted(url: str, x: Any) -> Any:
    status, text = ask(f"{url}/predict", json.dumps({"inputs": {"x": x.tolist()}}).encode())
    assert status == 200, text
    return np.array(json.loads(text)["outputs"]["y"], np.float32)


def test_many_at_once_get_their_own_outputs(url: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(1 + i % 3, 1 + i % 2, 48) for i in range(24)]
    samples = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    with ThreadPoolExecutor(12) as clients:
        results = list(clients.map(lambda x: predicted(url, x), samples))
    for x, y in zip(samples, results, strict=True):
        np.testing.assert_allclose(y, x @ WEIGHT.T, rtol=1e-4, atol=1e-5)
    text = ask(f"{url}/metrics")[1]
    counted = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert float(counted["request_seconds_count"]) >= 24
    assert float(counted["batch_samples_sum"]) >= sum(size[0] for size in sizes)


def test_health(url: str) -> None:
    status, text = ask(f"{url}/health")
    assert status == 200
    found = json.loads(text)
    assert found["status"] == "ready"
    assert found["inputs"] == {"x": ["tensor(float)", ["batch", "length", 48]]}
    assert found["waiting"] == 0


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "the request is no JSON"),
        (b"[" * 100_000, 400, "the request is no JSON"),
        (b"[1]", 422, '\\"inputs\\" must be an object with the names x'),
        (b'{"inputs": {"z": [1]}}', 422, "with the names x"),
        (b'{"inputs": {"x": "text"}}', 422, "input 'x' is no array of tensor(float)"),
        (b'{"inputs": {"x": [[[1, 2], [3]]]}}', 422, "input 'x' is no array"),
        (b'{"inputs": {"x": [[[1, 2]]]}}', 422, "has the shape (1, 1, 2), and the file takes ['batch', 'length', 48]"),
        (b'{"inputs": {"x": 1}}', 422, "has the shape ()"),
        (b'{"inputs": {"x": [[[null, 1]]]}}', 422, "input 'x' is no array of tensor(float)"),
        (b'{"inputs": {"x": [[[true, false]]]}}', 422, "input 'x' is no array of tensor(float)"),
        (b'{"inputs": {"x": [[["1", "2"]]]}}', 422, "input 'x' is no array of tensor(float)"),
        (b'{"inputs": {"x": [[[1' + b"0" * 5000 + b"]]]}}", 400, "the request is no JSON"),
        (json.dumps({"inputs": {"x": np.zeros((9, 1, 48)).tolist()}}).encode(), 422, "1 to 8, not [9]"),
        (json.dumps({"inputs": {"x": np.zeros((0, 1, 48)).tolist()}}).encode(), 422, "has the shape (0,)"),
    ],
)
def test_wrong_requests(url: str, body: bytes, status: int, words: str) -> None:
    got, text = ask(f"{url}/predict", body)
    assert got == status
    assert words in text
    assert predicted(url, random(1, 1, 48)).shape == (1, 1, 48)  # and the server goes on


class Slow:
    """A session whose calls take as long as they are told to, and that remembers their batches."""

    def __init__(self, *, sizes: tuple[int | str | None, ...] = ("n", "n")) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.sizes = sizes  # the leading ones of input and output

    def get_inputs(self) -> list[Any]:
        return [type("Entry", (), {"name": "x", "shape": [self.sizes[0], 3], "type": "tensor(float)"})]

    def get_outputs(self) -> list[Any]:
        return [type("Entry", (), {"name": "x", "shape": [self.sizes[1], 3], "type": "tensor(float)"})]

    def run(self, _: list[str], feeds: dict[str, Any]) -> list[Any]:
        self.go.wait(10)
        self.batches.append(len(feeds["x"]))
        if np.isnan(feeds["x"]).any():
            raise RuntimeError("no numbers")
        return [feeds["x"][:1] if np.isinf(feeds["x"]).any() else feeds["x"]]


async def batched(
    session: Slow, arrays: list[Any], max_batch: int, max_waiting: int = 99, scales: list[float] | None = None
) -> list[Any]:
    """What becomes of requests that all come while the first runs."""
    beside = [{}] * len(arrays) if scales is None else [{"scale": np.array(one, np.float32)} for one in scales]
    batcher = Batcher(session, max_batch=max_batch, max_waiting=max_waiting)
    work = asyncio.create_task(batcher.work())
    first, *others = ({"x": array, **more} for array, more in zip(arrays, beside, strict=True))
    running = asyncio.create_task(batcher.run(first))
    await asyncio.sleep(0.02)  # it runs now
    waiting = [asyncio.create_task(batcher.run(feeds)) for feeds in others]
    await asyncio.sleep(0.02)
    session.go.set()
    results = await asyncio.gather(running, *waiting, return_exceptions=True)
    work.cancel()
    return results


class Scaled(Slow):
    """The same with a scalar beside the samples."""

    def get_inputs(self) -> list[Any]:
        return [*super().get_inputs(), type("Entry", (), {"name": "scale", "shape": [], "type": "tensor(float)"})]

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        (y,) = super().run(names, {"x": feeds["x"]})
        return [y * feeds["scale"]]


def rows(*sizes: int, width: int = 3) -> list[Any]:
    return [np.full((size, width), float(i), np.float32) for i, size in enumerate(sizes)]


def test_what_comes_meanwhile_runs_together() -> None:
    session = Slow()
    results = asyncio.run(batched(session, [*rows(1, 2, 1, 3), *rows(1, width=5)], max_batch=4))
    assert session.batches == [1, 3, 3, 1]  # 2 + 1, then 3, which would have been two too many; other sizes apart
    assert [len(result["x"]) for result in results] == [1, 2, 1, 3, 1]
    assert [float(result["x"][0, 0]) for result in results] == [0, 1, 2, 3, 0]


def test_requests_with_the_same_scalar_run_together() -> None:
    session = Scaled()
    results = asyncio.run(batched(session, rows(1, 2, 1, 1), max_batch=8, scales=[2, 3, 2, 3]))
    assert session.batches == [1, 3, 1]
    assert [float(result["x"][0, 0]) for result in results] == [0, 3, 4, 9]


@pytest.mark.parametrize("sizes", [(2, 2), ("n", "m"), ("n", None), (None, None), ("n", 3)])
def test_samples_that_may_not_lie_along_the_leading_axis_run_alone(sizes: tuple[int | str | None, ...]) -> None:
    session = Slow(sizes=sizes)
    asyncio.run(batched(session, rows(2, 2, 2), max_batch=16))
    assert session.batches == [2, 2, 2]


def test_outputs_of_another_length_than_the_file_says_are_not_cut() -> None:
    session = Slow()
    results = asyncio.run(batched(session, [*rows(1), np.full((1, 3), np.inf, np.float32), *rows(1)], max_batch=8))
    assert session.batches == [1, 2, 1, 1]  # the two are run again, each alone
    assert [len(result["x"]) for result in results] == [1, 1, 1]


def test_too_many_are_refused_and_the_others_served() -> None:
    session = Slow()
    results = asyncio.run(batched(session, rows(1, 2, 2, 1), max_batch=8, max_waiting=3))
    assert [getattr(result, "status_code", 200) for result in results] == [200, 200, 503, 200]


def test_who_has_gone_is_left_out() -> None:
    async def run() -> list[int]:
        session = Slow()
        batcher = Batcher(session, max_batch=8, max_waiting=99)
        work = asyncio.create_task(batcher.work())
        tasks = []
        for array in (*rows(1, 2), *rows(1, width=5)):
            tasks.append(asyncio.create_task(batcher.run({"x": array})))
            await asyncio.sleep(0.01)
        tasks[1].cancel()  # alone of its size
        await asyncio.sleep(0.01)
        session.go.set()
        await asyncio.gather(tasks[0], tasks[2])
        work.cancel()
        return session.batches

    assert asyncio.run(run()) == [1, 1]


def test_what_onnx_runtime_refuses_is_an_answer_for_that_request_alone() -> None:
    session, wrong = Slow(), np.full((1, 3), np.nan, np.float32)
    results = asyncio.run(batched(session, [*rows(1), wrong, *rows(2)], max_batch=8))
    assert [getattr(result, "status_code", 200) for result in results] == [200, 500, 200]
    assert "no numbers" in results[1].detail


def entry(kind: str, *shape: int | str, name: str = "x") -> Any:
    return type("Entry", (), {"name": name, "shape": list(shape), "type": f"tensor({kind})"})


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("int64", [1.5], "is no array of tensor(int64)"),
        ("int64", [1.0], "is no array of tensor(int64)"),
        ("uint8", [-1], "has numbers that no tensor(uint8) holds"),
        ("int32", [2**31], "has numbers that no tensor(int32) holds"),
        ("int64", [2**70], "is no array of tensor(int64)"),
        ("bool", ["false"], "is no array of tensor(bool)"),
        ("bool", [{}], "is no array of tensor(bool)"),
        ("float", [[1], [2, 3]], "is no array"),
        ("int64", [1, True], "is no array of tensor(int64)"),
        ("float", [0.5, False], "is no array of tensor(float)"),
        ("float", [1e39], "has numbers that no tensor(float) holds"),
    ],
)
def test_nothing_becomes_another_kind_of_number(kind: str, given: list[Any], words: str) -> None:
    with pytest.raises(HTTPException) as error:
        _array("x", given, entry(kind, "n"))
    assert words in error.value.detail


def test_sizes_of_one_name_are_equal() -> None:
    session = type("Session", (), {"get_inputs": lambda _: [entry("float", "n", "length", name=name) for name in "xy"]})
    given = {"x": [[1.0, 2.0]], "y": [[1.0, 2.0]]}
    assert arrays(session(), given, 8)["y"].shape == (1, 2)
    with pytest.raises(HTTPException) as error:
        arrays(session(), given | {"y": [[1.0]]}, 8)
    assert error.value.status_code == 422
    assert error.value.detail == "the size 'length' is 1 in input 'y' and 2 in input 'x'"


def saved(folder: Path, nodes: list[Any], inputs: list[Any], output: Any, *weights: Any) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "a.onnx")
    return folder / "a.onnx"


def values(name: str, *sizes: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def answers(app: Any, *bodies: dict[str, Any], parts: int = 1, pause: float = 0.0) -> list[tuple[int, Any]]:
    """What an application answers to requests that come together, each in parts; there is no server."""

    async def called(body: dict[str, Any]) -> tuple[int, Any]:
        whole, sent = json.dumps({"inputs": body}).encode(), list[dict[str, Any]]()
        step = -(-len(whole) // parts)
        chunks = [whole[start : start + step] for start in range(0, len(whole), step)]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(
            {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}, receive, send
        )
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))

    async def all_of_them() -> list[tuple[int, Any]]:
        async with app.router.lifespan_context(app):
            return await asyncio.gather(*map(called, bodies))

    return asyncio.run(all_of_them())


def test_scalars_and_fixed_sizes_are_served(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "shift"], ["y"])]
    path = saved(tmp_path, nodes, [values("scale"), values("x", "n", 2), values("shift", 1, 2)], values("y", "n", 2))
    body = {"x": [[1, 2], [3, 4]], "scale": 10, "shift": [[0.5, 0]]}
    assert answers(make_app(path, max_batch=2), body, {**body, "x": [[1, 2]] * 3}) == [
        (200, {"outputs": {"y": [[10.5, 20], [30.5, 40]]}}),
        (422, {"detail": "x must hold the same number of samples, 1 to 2, not [3]"}),
    ]
    path = saved(tmp_path, [helper.make_node("Neg", ["x"], ["y"])], [values("x", 3)], values("y", 3))
    assert answers(make_app(path, max_batch=2), {"x": [1, 2, 3]}) == [(200, {"outputs": {"y": [-1, -2, -3]}})]


def test_what_is_rounded_by_one_scale_runs_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["y"]),
    ]
    app = make_app(saved(tmp_path, nodes, [values("x", "n", 1)], values("y", "n", 1)), max_batch=8)
    found = answers(app, *({"x": [[number]]} for number in (1e6, 1.0, 1e6, 2.0)))
    assert [one["outputs"]["y"][0][0] for _, one in found] == pytest.approx([1e6, 1.0, 1e6, 2.0])
    assert not app.state.batcher.together  # they may have come one after another


def test_requests_that_do_not_end_are_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"x": np.zeros((1, 1, 48)).tolist()}
    monkeypatch.setattr("srigl_fx.serving.http.LONGEST_BODY", 0.02)
    ((status, found),) = answers(make_app(path), body, parts=4, pause=0.01)
    assert (status, found["detail"]) == (408, "a request must be here within 0.02 seconds")


def test_requests_that_are_too_many_to_read_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"x": np.zeros((1, 1, 48)).tolist()}
    monkeypatch.setattr("srigl_fx.serving.http.MOST_BYTES", 300)  # each has 260
    app = make_app(path)
    assert sorted(status for status, _ in answers(app, body, body, parts=4, pause=0.01)) == [200, 503]
    assert app.state.batcher.refused.collect()[0].samples[0].value == 1


def test_what_is_not_finite_is_null() -> None:
    array = np.array([[1.5, np.nan], [np.inf, -2]], np.float32)
    assert json.loads(json.dumps(listed(array), allow_nan=False)) == [[1.5, None], [None, -2]]


def test_what_cannot_be_served_is_refused_at_the_start(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="max_waiting=3 would refuse requests of max_batch=4 samples"):
        make_app(path, max_batch=4, max_waiting=3)
    text = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [text], [text])
    graph.output[0].name = "y"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(FormatError, match=r"'x' is a tensor\(string\)"):
        make_app(tmp_path / "a.onnx")


@pytest.mark.long
def test_the_command_serves_until_it_is_told_to_end(path: Path) -> None:
    command = [sys.executable, "-c", "from srigl_fx.cli import main; main()", "serve", str(path), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        line = next(line for line in server.stderr if line.startswith("serving "))
        assert line.startswith(f"serving {path} on http://127.0.0.1:")
        url = line.split()[-1]
        assert json.loads(ask(f"{url}/health")[1])["model"] == path.name
        x = random(2, 3, 48)
        np.testing.assert_allclose(predicted(url, x), x @ WEIGHT.T, rtol=1e-4, atol=1e-5)
        assert "batch_samples_count 1.0" in ask(f"{url}/metrics")[1]
    finally:
        os.kill(server.pid, signal.SIGTERM)
        out, said = server.communicate(timeout=60)
    assert (server.returncode, out, said) == (0, "", "ended\n")


def test_what_the_command_cannot_serve_is_one_line(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", path, "--port", port)
        assert_readable_error(result, f"cannot listen on 127.0.0.1:{port}", "Address already in use", "another --port")
    assert_readable_error(run("serve", path, "--host", "192.0.2.1"), "cannot listen on", "another --host")
    assert_readable_error(run("serve", tmp_path / "none.onnx"), "there is no file")
    (tmp_path / "text.onnx").write_text("no model")
    assert_readable_error(run("serve", tmp_path / "text.onnx"), "ONNX Runtime cannot load")
    assert_readable_error(run("serve", tmp_path / "text.onnx", "--stock"), "ONNX Runtime cannot load")


@pytest.mark.parametrize(
    "options", [("--port", 70000), ("--max-batch", 0), ("--threads", 0), ("--max-batch", 9, "--max-waiting", 8)]
)
def test_wrong_usage(options: tuple[object, ...]) -> None:
    assert_wrong_usage(run("serve", "a.onnx", *options))


def test_without_fastapi_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srigl_fx.cli.serve.PACKAGES", {"no_such_module": "fastapi"})
    assert_readable_error(run("serve", "a.onnx"), "needs fastapi", "pip install 'srigl-fx[serve]'")
