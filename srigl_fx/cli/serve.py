"""The command ``serve``: an ONNX file over HTTP.

Owns its arguments, the socket, and how it ends. It must not know what is answered (:mod:`srigl_fx.serving`).
"""

import errno
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer

from srigl_fx.cli.options import Threads
from srigl_fx.cli.output import require_extra, say, working
from srigl_fx.errors import SriglError

LAST_SECONDS = 30  # that requests may take once the server is told to end
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def serve(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    host: Annotated[str, typer.Option(help="The address to listen on; by default this machine alone can ask.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    threads: Threads = 1,
    max_batch: Annotated[
        int, typer.Option(min=1, help="The most samples that run together, and the most of one request.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="The most samples that wait; what comes beyond gets status 503.")
    ] = 256,
    stock: Annotated[bool, typer.Option("--stock", help="Without the operator library, as fast as dense.")] = False,
) -> None:
    """Serve an ONNX file over HTTP: POST /predict, GET /health, GET /metrics. Ends with Ctrl-C or SIGTERM."""
    if max_waiting < max_batch:
        raise typer.BadParameter(
            f"requests of --max-batch={max_batch} samples would be refused for ever", param_hint="--max-waiting"
        )
    with working(f"opening {file}"):
        require_extra("serve", PACKAGES)
        import uvicorn

        from srigl_fx.serving.http import make_app

        app = make_app(file, max_batch=max_batch, max_waiting=max_waiting, threads=threads, stock=stock)
        listening = _listen(host, port)
    say(f"serving {file} on http://{_shown(host)}:{listening.getsockname()[1]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn answers what it has, then raises the signal
    try:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_SECONDS)
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        say("ended")
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        hint = f"give another {'--port' if error.errno in (errno.EADDRINUSE, errno.EACCES) else '--host'}"
        raise SriglError(f"cannot listen on {_shown(host)}:{port}: {error.strerror or error}; {hint}") from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
