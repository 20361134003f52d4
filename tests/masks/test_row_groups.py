"""Which rows share their inputs, by hand and against loops over single rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_support.literal_groups import alike, groups_of, inputs_of

from srigl_fx.masks.records import Block, WeightRecord, WeightSite
from srigl_fx.masks.row_groups import GROUP_SIZES, RowGroups


def rows_of(groups: RowGroups) -> list[list[int]]:
    return [(groups.index == group).nonzero()[:, 0].tolist() for group in range(len(groups))]


@st.composite
def row_groups(draw: st.DrawFn) -> RowGroups:
    """Blocks of up to 40 rows, anywhere in a weight with sections or without."""
    section = draw(st.none() | st.integers(1, 12))
    start = draw(st.integers(0, 20)) if section is not None else 0
    return RowGroups(
        rows=draw(st.integers(1, 40)), size=draw(st.sampled_from(GROUP_SIZES)), section=section, start=start
    )


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (RowGroups(rows=3), [[0], [1], [2]]),
        (RowGroups(rows=8, size=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (RowGroups(rows=7, size=4), [[0, 1, 2, 3], [4, 5, 6]]),
        (RowGroups(rows=3, size=32), [[0, 1, 2]]),
        (RowGroups(rows=6, size=2, section=3), [[0, 1], [2], [3, 4], [5]]),
        (RowGroups(rows=4, size=4, section=1), [[0], [1], [2], [3]]),
        # A block counts from its own first row, and from that of each section in it.
        (RowGroups(rows=5, size=2, start=3), [[0, 1], [2, 3], [4]]),
        (RowGroups(rows=5, size=2, section=4, start=3), [[0], [1, 2], [3, 4]]),
    ],
)
def test_groups_by_hand(groups: RowGroups, expected: list[list[int]]) -> None:
    assert rows_of(groups) == expected
    assert groups.sizes.tolist() == [len(rows) for rows in expected]


@settings(deadline=None)
@given(row_groups())
def test_groups_end_where_they_are_full_and_where_a_section_ends(groups: RowGroups) -> None:
    assert rows_of(groups) == groups_of(groups.rows, groups.size, groups.section, groups.start)


@settings(deadline=None)
@given(row_groups(), st.integers(1, 5), st.integers(0, 999))
def test_rows_become_groups_and_groups_rows(groups: RowGroups, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 10, (groups.rows, columns), generator=generator) / 4
    mask = values > 1
    members = rows_of(groups)
    assert groups.sum(values).tolist() == [values[rows].double().sum(dim=0).tolist() for rows in members]
    assert groups.any(mask).tolist() == [mask[rows].any(dim=0).tolist() for rows in members]
    active = torch.rand(groups.rows, generator=generator) < 0.7
    whole, part = groups.expand(groups.any(mask)), groups.expand(groups.any(mask), active)
    for group, rows in enumerate(members):
        for row in rows:
            assert torch.equal(whole[row], groups.any(mask)[group])
            assert torch.equal(part[row], whole[row] & active[row])


def test_sums_are_taken_in_the_order_of_the_rows() -> None:
    values = torch.tensor([[1e16], [1.0], [-1e16], [1.0]], dtype=torch.float64)
    assert RowGroups(rows=4, size=4).sum(values).tolist() == [[1.0]]
    assert RowGroups(rows=4, size=4).sum(values.flip(0)).tolist() == [[0.0]]


@settings(deadline=None)
@given(row_groups(), st.integers(1, 9), st.data())
def test_shares_of_a_budget(groups: RowGroups, columns: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, groups.rows * columns))
    literal = groups_of(groups.rows, groups.size, groups.section, groups.start)
    shares = [(groups.sizes[some], inputs) for some, inputs in groups.shares(budget)]
    assert sorted((int(sizes[0]), inputs) for sizes, inputs in shares) == sorted(
        (len(literal[some[0]]), inputs_of(literal, some, budget)) for some in alike(literal)
    )
    kept = sum(int(sizes[0]) * inputs for sizes, inputs in shares)
    # What is left is less than an input of each size.
    assert budget - sum(int(sizes[0]) for sizes, _ in shares) < kept <= budget
    assert all(inputs <= len(sizes) * columns for sizes, inputs in shares)
    assert (groups.size > 1) | (kept == budget)


@settings(deadline=None)
@given(row_groups(), st.integers(0, 999), st.data())
def test_a_row_that_differs_is_found_and_named(groups: RowGroups, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(len(groups), 6, generator=generator) < 0.5
    shared[:, 0] = True  # a row without inputs is an ablated one
    active = torch.rand(groups.rows, generator=generator) < 0.7
    mask = groups.expand(shared, active)
    assert groups.fault(mask) == ""
    row, column = data.draw(st.integers(0, groups.rows - 1)), data.draw(st.integers(1, 5))
    mask[row, column] ^= True
    group = next(rows for rows in rows_of(groups) if row in rows)
    others = [other for other in group if other != row and active[other]]
    fault = groups.fault(mask)
    if not others:
        assert fault == ""
    else:
        first, last = group[0] + groups.start, group[-1] + groups.start
        assert (
            fault == f"rows {first}-{last} share their inputs (group_size={groups.size}), but do not keep the same ones"
        )


def test_the_groups_of_a_weight_stay_in_its_blocks_and_in_a_convolutions_groups() -> None:
    def indices(site: WeightSite, size: int) -> list[list[int]]:
        record = WeightRecord(site=site, structure="constant_fan_in", group_size=size)
        return [record.row_groups(block).index.tolist() for block in site.blocks]

    blocks = (Block(name="q", start=0, stop=3), Block(name="k", start=3, stop=8))
    assert indices(WeightSite(owner="", attr="w", kind="attention_in", shape=(8, 4), blocks=blocks), 2) == [
        [0, 0, 1],
        [0, 0, 1, 1, 2],
    ]
    grouped = WeightSite(owner="", attr="w", kind="conv2d", shape=(10, 4, 3, 3), groups=2)
    assert indices(grouped, 4) == [[0, 0, 0, 0, 1, 2, 2, 2, 2, 3]]
    # Of a transposed convolution the neurons are (groups, out / groups).
    transposed = WeightSite(owner="", attr="w", kind="conv_transpose2d", shape=(8, 3, 2, 2), groups=2)
    assert indices(transposed, 2) == [[0, 0, 1, 2, 2, 3]]
