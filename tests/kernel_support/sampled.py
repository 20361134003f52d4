"""A pytest plugin that runs every test with a quarter of its parameters: ``-p kernel_support.sampled``.

For instruction sets beyond this process's, whose kernels are compiled from the same source: all tests run there, each
on the same quarter every time, which looks random. The host's run has all of it.
"""

from collections import defaultdict
from zlib import crc32

import pytest

SHARE = 4


def sampled(ids: list[str]) -> list[str]:
    """A quarter of the names of one test with its parameters, and at least one."""
    return sorted(ids, key=lambda name: crc32(name.encode()))[: -(-len(ids) // SHARE)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the others."""
    tests: dict[str, list[str]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item.nodeid)
    kept = {name for names in tests.values() for name in sampled(names)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]
