"""The HTTP application of an ONNX file, with FastAPI.

``POST /predict`` takes arrays by the names of the file's inputs, as nested lists with the axis of samples first, and
gives the outputs alike; numbers that are not finite are null. ``GET /health`` says what is served, ``GET /metrics``
counts and times for Prometheus.

Nobody waits for others to come: a request is run at once if nothing else runs. What comes in the meantime is put
together by size, up to ``max_batch`` samples, and the group whose first request is the oldest is next. More than
``max_waiting`` samples are not kept: these requests get status 503, at once. Requests are put together only where the
file says by one name that all its inputs and outputs have the samples as their leading axis; else each runs alone.
Those that run together have equal scalars. A file that rounds all samples of a call by one scale runs them one request
at a time, as a sample of somebody else's would change the outputs.

Owns the routes and the session behind them. It must not know how a server listens.
"""

import asyncio
import json
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import prometheus_client
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from srigl_fx.errors import FormatError
from srigl_fx.onnx_export.tensor_types import DTYPES
from srigl_fx.runtime.ort.session import load
from srigl_fx.serving.arrays import arrays, listed
from srigl_fx.serving.batcher import MOST_WORDS, Array, Batcher

LARGEST_BODY = 16 << 20  # bytes of a request
MOST_BYTES = 16 * LARGEST_BODY  # of all requests that are being read
LONGEST_BODY = 30.0  # seconds that one may take to arrive

_ONE_SCALE = b"DynamicQuantize"  # begins the names of operators that take the scale of their input from all of it


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
        FormatError: There is no such file, ONNX Runtime refuses it, it has inputs or outputs that are no tensors of
            numbers, or fewer samples may wait than one request has.
    """
    if max_waiting < max_batch:
        raise FormatError(f"max_waiting={max_waiting} would refuse requests of max_batch={max_batch} samples for ever")
    session = _session(path, threads, stock=stock)
    for entry in (*session.get_inputs(), *session.get_outputs()):
        if entry.type not in DTYPES:
            raise FormatError(f"{path} cannot be served so: {entry.name!r} is a {entry.type}")
    batcher = Batcher(session, max_batch=max_batch, max_waiting=max_waiting, apart=_holds(path, _ONE_SCALE))
    held = 0  # bytes of requests that are being read

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.work = asyncio.create_task(batcher.work())
        yield
        app.state.work.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.batcher = batcher

    def read(body: bytes) -> dict[str, Array]:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the request is no JSON: {str(error)[:MOST_WORDS]}") from error
        return arrays(session, given.get("inputs") if isinstance(given, dict) else None, max_batch)

    def written(outputs: dict[str, Array]) -> str:
        return json.dumps({"outputs": {name: listed(array) for name, array in outputs.items()}}, allow_nan=False)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        nonlocal held
        body = bytearray()
        try:
            async with asyncio.timeout(LONGEST_BODY):
                async for chunk in request.stream():
                    body += chunk
                    held += len(chunk)
                    if len(body) > LARGEST_BODY:
                        raise HTTPException(413, f"a request may have {LARGEST_BODY} bytes")
                    if held > MOST_BYTES:
                        batcher.refuse()
            feeds = await asyncio.to_thread(read, bytes(body))  # others are answered meanwhile
        except ClientDisconnect:
            return Response(status_code=400)
        except TimeoutError as error:
            raise HTTPException(
                408, f"a request must be here within {LONGEST_BODY:g} seconds", {"Connection": "close"}
            ) from error
        finally:
            held -= len(body)
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


def _holds(path: Path, text: bytes) -> bool:
    """Whether a text stands anywhere in a file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0


def _session(path: Path, threads: int, *, stock: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not stock:
        return load(path, session_options=options)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise FormatError(f"ONNX Runtime cannot load {path}: {error}") from error
