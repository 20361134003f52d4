"""The tile panel of eight bits: all kept weights are there, and neighbours' products fit where they are added up."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_PAIRS
from srigl_fx.runtime.cpu.kernels.quads import PAIR_LIMIT, QUAD_BYTES, QUAD_VALUES, quads_of
from srigl_fx.runtime.cpu.prepared_weights import Job, pack

Rows = NDArray[np.int8]


def random_rows(n: int, k: int, seed: int) -> Rows:
    return np.random.default_rng(seed).integers(-128, 128, (n, k)).astype(np.int8)


def one_sign(n: int, k: int, value: int) -> Rows:
    return np.full((n, k), value, np.int8)


def one_heavy_row(n: int, k: int) -> Rows:
    values = random_rows(n, k, 1) // 4
    values[n // 2] = 127
    return values


CASES = {
    "random": random_rows(40, 67, 0),
    "small": random_rows(33, 64, 2) // 3,
    "positive": np.abs(random_rows(17, 31, 3).astype(np.int16)).clip(0, 127).astype(np.int8),
    "all 127": one_sign(19, 9, 127),
    "all -128": one_sign(5, 65, -128),
    "all 64": one_sign(16, 63, 64),
    "all 65": one_sign(3, 64, 65),
    "one heavy row": one_heavy_row(48, 130),
    "one weight": one_sign(2, 1, 100),
}


def packed(values: Rows, indices: NDArray[np.uint16]) -> list[tuple[NDArray[np.uint16], Rows]]:
    """What the panel has for each row, whose indices are its own: indices and values, four by four."""
    n, in_features = len(values), int(indices.max()) + 1
    given = torch.from_numpy(values), torch.from_numpy(indices), torch.arange(n, dtype=torch.int32)
    template, memory = pack(plan.INT8_TILE, in_features, *given, in_features, n, n, torch.ones(n))
    j = Job.from_buffer_copy(template)
    base, groups = memory[0].ctypes.data, memory[1].reshape(-1, job.GROUP_WORDS)
    rows = []
    for this, following in itertools.pairwise(groups):
        count = following[job.GROUP_ROW] - this[job.GROUP_ROW]
        size = this[job.GROUP_QUADS] * QUAD_BYTES
        assert following[job.GROUP_AT] - this[job.GROUP_AT] == count * size
        for i in range(count):
            at = j[job.PANEL] - base + int(this[job.GROUP_AT] + i * size)
            quads = memory[0][at : at + size].reshape(-1, QUAD_BYTES)
            found = np.ascontiguousarray(quads[:, :QUAD_VALUES]).view(np.uint16), quads[:, QUAD_VALUES:].view(np.int8)
            rows.append((found[0].reshape(-1), found[1].reshape(-1)))
    assert ctypes.sizeof(j) == 8 * job.SIZE
    return rows


def some_indices(n: int, k: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(n)
    return np.stack([np.sort(rng.choice(2 * k + 3, k, replace=False)) for _ in range(n)]).astype(np.uint16)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_there_once_and_pairs_fit(case: str) -> None:
    values = CASES[case]
    indices = some_indices(*values.shape)
    for row, (places, found) in enumerate(packed(values, indices)):
        kept = found != 0
        dense = np.zeros(int(indices.max()) + 1, np.int64)
        np.add.at(dense, places[kept].astype(np.int64), found[kept])
        expected = np.zeros_like(dense)
        expected[indices[row].astype(np.int64)] = values[row]
        np.testing.assert_array_equal(dense, expected)
        pairs = found.astype(np.int64).reshape(-1, 2)
        if BYTE_PAIRS:
            assert (pairs.clip(0).sum(1) <= PAIR_LIMIT).all()
            assert ((-pairs).clip(0).sum(1) <= PAIR_LIMIT).all()
        assert np.abs(255 * pairs).max() < 2**15


def test_few_weights_of_zero_are_added() -> None:
    # As trained weights are: of both signs, and seldom near the largest.
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((64, 300)) * 35).round().clip(-127, 127).astype(np.int8)
    values[values == 0] = 1
    rows = packed(values, some_indices(64, 300))
    assert max(len(found) for _, found in rows) <= 4 * (quads_of(300) + 1)


def test_a_heavy_row_lengthens_those_of_its_group_alone() -> None:
    values = CASES["one heavy row"]
    lengths = [len(found) for _, found in packed(values, some_indices(*values.shape))]
    usual = 4 * quads_of(130)
    assert lengths[:16] == lengths[32:] == [usual] * 16
    assert set(lengths[16:32]) == {260 if BYTE_PAIRS else usual}


@pytest.mark.parametrize("together", [1, 2, 3, 4, 7, 16])
def test_rows_that_share_their_indices(together: int) -> None:
    """By four or more they have these once; fewer have not, where rows by themselves are faster."""
    n, k, in_features = 32, 10, 40
    rows = np.arange(n, dtype=np.int32) // together
    values, indices = torch.ones(n, k, dtype=torch.int8), torch.from_numpy(some_indices(rows[-1] + 1, k))
    every = np.arange(n, dtype=np.int32)
    active = torch.from_numpy(np.stack([every, rows]) if together > 1 else every)
    template, _ = pack(plan.INT8_TILE, in_features, values, indices, active, in_features, n, n, torch.ones(n))
    quads, size = quads_of(k), 0
    for group in (rows[:16], rows[16:]):
        for row in np.unique(group):
            count = int((group == row).sum())
            once = count > 1 and (count > 3 or not BYTE_PAIRS)
            size += quads * (QUAD_VALUES + 4 * count) if once else count * quads * QUAD_BYTES
    assert Job.from_buffer_copy(template)[job.PANEL_BYTES] == size


def test_padding_is_no_weight() -> None:
    values, indices = one_sign(4, 6, 127), np.tile(np.array([0, 2, 5, 5, 5, 5], np.uint16), (4, 1))
    for places, found in packed(values, indices):
        assert sorted(places[found != 0].tolist()) == [0, 2, 5]
