"""The blocks of Numba's simulator, without its polling: the threads of a block hand the turn on to each other.

What a kernel may call stays Numba's. Between two barriers one thread runs after the other, in turn from the first to
the last and from the last to the first, so that a barrier that is missing shows in the results.
"""

import threading
from importlib import import_module
from typing import Any

import numpy as np


def use() -> None:
    """Have the simulator take these blocks."""
    simulator: Any = import_module("numba.cuda.simulator.kernel")
    if simulator.BlockManager.__name__ == "Turns":
        return
    thread_of_block, manager_of_block = simulator.BlockThread, simulator.BlockManager

    class Turn(thread_of_block):  # type: ignore[misc, valid-type]
        """A thread of a block, which runs when it is its turn."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.mine, self.theirs, self.ended = threading.Semaphore(0), threading.Semaphore(0), False

        def run(self) -> None:
            self.mine.acquire()
            if not self.abort:
                super().run()
            self.ended = True
            self.theirs.release()

        def syncthreads(self) -> None:
            self.theirs.release()
            self.mine.acquire()
            if self.abort:
                raise RuntimeError("another thread of the block failed")

        def take(self) -> None:
            """Let it run up to its next barrier, or to its end."""
            self.mine.release()
            self.theirs.acquire()

    class Turns(manager_of_block):  # type: ignore[misc, valid-type]
        """A block."""

        def run(self, grid_point: tuple[int, ...], *arguments: Any) -> None:
            def target() -> None:
                self._f(*arguments)

            threads = [Turn(target, self, grid_point, point, self._debug) for point in np.ndindex(*self._block_dim)]
            for thread in threads:
                thread.start()
            _in_turn(threads)

    simulator.BlockManager = Turns


def _in_turn(threads: list[Any]) -> None:
    failed: tuple[Exception, Any] | None = None
    while threads:
        for thread in threads:
            thread.abort = failed is not None
            thread.take()
            failed = failed or thread.exception
        threads = [thread for thread in reversed(threads) if not thread.ended]
    if failed is not None:
        raise failed[0].with_traceback(failed[1])
