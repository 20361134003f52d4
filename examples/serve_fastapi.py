"""An HTTP server for an ONNX file, with FastAPI: requests that come while another runs are run together.

    python examples/serve_fastapi.py model.onnx --port 8000
    curl -s localhost:8000/predict -d '{"inputs": {"x": [[0.5, 1.0]]}}'

``POST /predict`` takes arrays by the names of the file's inputs, as nested lists with the axis of samples first, and
gives the outputs alike; numbers that are not finite are null. ``GET /health`` says what is served, ``GET /metrics``
counts and times for Prometheus. It needs ``pip install 'srigl-fx[serve]'``.

Nobody waits for others to come: a request is run at once if nothing else runs. What comes in the meantime is put
together by size, up to ``--max-batch`` samples, and the group whose first request is the oldest is next. More than
``--max-waiting`` samples are not kept: these requests get status 503, at once. Requests are put together only where the
file says by one name that all its inputs and outputs have the samples as their leading axis; else each runs alone.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import prometheus_client
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

import srigl_fx as sx

Array = NDArray[Any]
LARGEST_BODY = 16 << 20  # bytes of a request
MOST_WORDS = 300  # characters of somebody else's error that are sent on
DTYPES = {
    **{"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16},
    **{"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_},
    **{"tensor(uint8)": np.uint8, "tensor(int8)": np.int8},
}


@dataclass
class Waiting:
    """A request: its arrays, how many samples they hold, since when it waits, and who waits for its outputs."""

    feeds: dict[str, Array]
    rows: int
    since: float
    answer: "asyncio.Future[dict[str, Array]]"


class Batcher:
    """Runs a session on one request after another, those of like sizes together.

    Args:
        session: Of ONNX Runtime.
        max_batch: The most samples that are run together, at least 1.
        max_waiting: The most samples that wait.
    """

    def __init__(self, session: onnxruntime.InferenceSession, *, max_batch: int, max_waiting: int) -> None:
        self.session, self.max_batch, self.max_waiting = session, max_batch, max_waiting
        self.outputs = [entry.name for entry in session.get_outputs()]
        tensors = [*session.get_inputs(), *session.get_outputs()]
        leading = {entry.shape[0] if entry.shape else None for entry in tensors}
        self.together = len(leading) == 1 and isinstance(next(iter(leading)), str)
        self.groups: dict[tuple[Any, ...], list[Waiting]] = {}
        self.came = asyncio.Event()
        self.registry = prometheus_client.CollectorRegistry()
        self.samples = prometheus_client.Histogram(
            "batch_samples", "Samples of a call.", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "From a request's arrival to its outputs.", registry=self.registry
        )
        self.refused = prometheus_client.Counter("refused", "Requests with status 503.", registry=self.registry)

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return sum(one.rows for group in self.groups.values() for one in group)

    async def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The outputs for the arrays of one request.

        Raises:
            HTTPException: 503 where too much waits, 500 where ONNX Runtime refuses the arrays.
        """
        rows = len(next(iter(feeds.values())))
        if self.waiting + rows > self.max_waiting:
            self.refused.inc()
            raise HTTPException(503, "too many requests are waiting; try again later", {"Retry-After": "1"})
        one = Waiting(feeds, rows, time.monotonic(), asyncio.get_running_loop().create_future())
        key = tuple((name, array.shape[1:]) for name, array in sorted(feeds.items()))
        self.groups.setdefault(key, []).append(one)
        self.came.set()
        outputs = await one.answer
        self.seconds.observe(time.monotonic() - one.since)
        return outputs

    async def work(self) -> None:
        """Run what waits, for ever; one call at a time, outside the loop's thread."""
        with ThreadPoolExecutor(1) as thread:
            while True:
                await self.came.wait()
                batch = self._next()
                if not batch:
                    self.came.clear()
                elif not await self._run(thread, batch):
                    for one in batch:  # one wrong request must not spoil the others
                        await self._run(thread, [one])

    async def _run(self, thread: ThreadPoolExecutor, batch: list[Waiting]) -> bool:
        """Run requests together and answer them; False, and no answer, where that fails for more than one."""
        rows = [one.rows for one in batch]
        try:
            feeds = {name: np.concatenate([one.feeds[name] for one in batch]) for name in batch[0].feeds}
            call = asyncio.get_running_loop().run_in_executor(thread, self.session.run, self.outputs, feeds)
            outputs = dict(zip(self.outputs, await call, strict=True))
            if len(batch) > 1 and any(len(output) != sum(rows) for output in outputs.values()):
                return False
        except Exception as error:  # ONNX Runtime's exceptions have no base class; the server goes on
            if len(batch) > 1:
                return False
            if not batch[0].answer.done():
                status = 422 if type(error).__name__ == "InvalidArgument" else 500
                batch[0].answer.set_exception(HTTPException(status, f"ONNX Runtime: {str(error)[:MOST_WORDS]}"))
            return True
        self.samples.observe(sum(rows))
        first = 0
        for one in batch:
            part = slice(first, first + one.rows)
            first += one.rows
            if not one.answer.done():  # who asked may have gone
                mine = outputs if len(batch) == 1 else {name: output[part] for name, output in outputs.items()}
                one.answer.set_result(mine)
        return True

    def _next(self) -> list[Waiting]:
        """The requests that are run now: of the group that has waited longest, as many as fit; none if none wait."""
        while self.groups:
            key = min(self.groups, key=lambda key: self.groups[key][0].since)
            group, rows = self.groups[key], 0
            batch: list[Waiting] = []
            while group and (not batch or (self.together and rows + group[0].rows <= self.max_batch)):
                one = group.pop(0)
                if not one.answer.done():  # who asked has gone
                    rows += one.rows
                    batch.append(one)
            if not group:
                del self.groups[key]
            if batch:
                return batch
        return []


def arrays(session: onnxruntime.InferenceSession, given: Any, max_batch: int) -> dict[str, Array]:
    """A request's arrays, checked against what the file takes.

    Raises:
        HTTPException: 422; the message names the input and says what is wrong.
    """
    wanted = {entry.name: entry for entry in session.get_inputs()}
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        raise HTTPException(422, f'"inputs" must be an object with the names {", ".join(sorted(wanted))}')
    feeds = {name: _array(name, given[name], entry) for name, entry in wanted.items()}
    rows = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    if len(rows) != 1 or not 1 <= min(rows) <= max_batch:
        raise HTTPException(
            422, f"all inputs must hold the same number of samples, 1 to {max_batch}, not {sorted(rows)}"
        )
    return feeds


def _array(name: str, given: Any, entry: Any) -> Array:
    """One input as an array of the file's type: whole numbers may become floats, and nothing else another kind."""
    dtype = np.dtype(DTYPES[entry.type])
    kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    try:
        found = np.asarray(given)
    except ValueError as error:  # lists of unequal lengths
        raise HTTPException(422, f"input {name!r} is no array: {str(error)[:MOST_WORDS]}") from error
    if found.size and found.dtype.kind not in kinds:
        raise HTTPException(422, f"input {name!r} is no array of {entry.type}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, found):
        raise HTTPException(422, f"input {name!r} has numbers that no {entry.type} holds")
    sizes = zip(array.shape, entry.shape, strict=False)
    fits = all(not isinstance(size, int) or size == got for got, size in sizes)
    if array.ndim != len(entry.shape) or not fits:
        raise HTTPException(422, f"input {name!r} has the shape {array.shape}, and the file takes {entry.shape}")
    return array


def _listed(array: Array) -> Any:
    """An output as JSON holds it: numbers that are not finite are null."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        objects = array.astype(object)
        objects[~np.isfinite(array)] = None
        return objects.tolist()
    return array.tolist()


def make_app(
    path: Path, *, max_batch: int = 16, max_waiting: int = 256, threads: int = 1, stock: bool = False
) -> FastAPI:
    """The application.

    Args:
        path: The ONNX file.
        max_batch: The most samples that are run together, and the most of one request.
        max_waiting: The most samples that wait.
        threads: Of a call.
        stock: Run the fallback inside the file, without the operator library.

    Raises:
        ValueError: The file has inputs or outputs that are no tensors of numbers, or fewer samples may wait than one
            request has.
    """
    if max_waiting < max_batch:
        raise ValueError(f"max_waiting={max_waiting} would refuse requests of max_batch={max_batch} samples for ever")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if stock:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    else:
        session = sx.runtime.load(path, session_options=options)
    for entry in (*session.get_inputs(), *session.get_outputs()):
        if entry.type not in DTYPES:
            raise ValueError(f"{path} cannot be served so: {entry.name!r} is a {entry.type}")
    batcher = Batcher(session, max_batch=max_batch, max_waiting=max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.work = asyncio.create_task(batcher.work())
        yield
        app.state.work.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def read(body: bytes) -> dict[str, Array]:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the request is no JSON: {str(error)[:MOST_WORDS]}") from error
        return arrays(session, given.get("inputs") if isinstance(given, dict) else None, max_batch)

    def written(outputs: dict[str, Array]) -> str:
        return json.dumps({"outputs": {name: _listed(array) for name, array in outputs.items()}}, allow_nan=False)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise HTTPException(413, f"a request may have {LARGEST_BODY} bytes")
        except ClientDisconnect:
            return Response(status_code=400)
        feeds = await asyncio.to_thread(read, bytes(body))  # others are answered meanwhile
        outputs = await batcher.run(feeds)
        return Response(await asyncio.to_thread(written, outputs), media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if app.state.work.done():
            raise HTTPException(503, "nothing runs requests any more: start the server anew")
        return {
            "status": "ready",
            "model": path.name,
            "inputs": {entry.name: [entry.type, entry.shape] for entry in session.get_inputs()},
            "waiting": batcher.waiting,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            prometheus_client.generate_latest(batcher.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    return app


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an ONNX file")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16, help="the most samples of a call (default 16)")
    parser.add_argument("--max-waiting", type=int, default=256, help="the most samples that wait (default 256)")
    parser.add_argument("--threads", type=int, default=1, help="of a call (default 1)")
    parser.add_argument("--stock", action="store_true", help="without the operator library")
    options = parser.parse_args()
    app = make_app(
        options.model,
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        threads=options.threads,
        stock=options.stock,
    )
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
