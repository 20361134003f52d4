"""Runs requests one after another, and those that came while another ran together.

Owns :class:`Batcher`: who waits, what runs together, and what becomes of a call that fails. It must not know HTTP's
bodies, or where a session comes from.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import prometheus_client
from fastapi import HTTPException
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]
MOST_WORDS = 300  # characters of somebody else's error that are sent on


def sample_inputs(inputs: Sequence[Any]) -> tuple[str, ...]:
    """The inputs that have the samples as their leading axis: those whose leading size is the first one that is free.

    A scalar has no such axis, and belongs to all samples of a request.

    Args:
        inputs: What ``session.get_inputs()`` says.
    """
    free = [entry for entry in inputs if entry.shape and not isinstance(entry.shape[0], int)]
    return tuple(entry.name for entry in free if entry.shape[0] == free[0].shape[0])


@dataclass
class Waiting:
    """A request: its arrays, how many samples they hold, since when it waits, and who waits for its outputs."""

    feeds: dict[str, Array]
    rows: int
    since: float
    answer: "asyncio.Future[dict[str, Array]]"


class Batcher:
    """Runs a session on one request after another, those of like sizes together.

    A request of a file that fixes how many samples it takes counts as one.

    Args:
        session: Of ONNX Runtime.
        max_batch: The most samples that are run together, at least 1.
        max_waiting: The most samples that wait.
        apart: Run each request alone.
    """

    def __init__(
        self, session: "onnxruntime.InferenceSession", *, max_batch: int, max_waiting: int, apart: bool = False
    ) -> None:
        self.session, self.max_batch, self.max_waiting = session, max_batch, max_waiting
        self.outputs = [entry.name for entry in session.get_outputs()]
        self.leading = sample_inputs(session.get_inputs())
        tensors = [*(entry for entry in session.get_inputs() if entry.shape), *session.get_outputs()]
        sizes = {entry.shape[0] if entry.shape else None for entry in tensors}
        self.together = not apart and bool(self.leading) and len(sizes) == 1 and isinstance(next(iter(sizes)), str)
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

    def refuse(self) -> NoReturn:
        """Refuse a request, and count that.

        Raises:
            HTTPException: 503.
        """
        self.refused.inc()
        raise HTTPException(503, "too many requests are waiting; try again later", {"Retry-After": "1"})

    async def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The outputs for the arrays of one request.

        Raises:
            HTTPException: 503 where too much waits, 500 where ONNX Runtime refuses the arrays.
        """
        rows = len(feeds[self.leading[0]]) if self.leading else 1
        if self.waiting + rows > self.max_waiting:
            self.refuse()
        one = Waiting(feeds, rows, time.monotonic(), asyncio.get_running_loop().create_future())
        # A scalar is one of all samples that run together.
        key = tuple((name, array.shape[1:] if array.ndim else array.tobytes()) for name, array in sorted(feeds.items()))
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
            feeds = batch[0].feeds
            if len(batch) > 1:
                feeds = feeds | {name: np.concatenate([one.feeds[name] for one in batch]) for name in self.leading}
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
