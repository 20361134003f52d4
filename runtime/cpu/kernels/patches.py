"""The inputs of a tile of a convolution's output positions, a row for each tap (channel, kd, kh, kw) of a filter.

Owns where each tap of each position is in ``x``, and how it gets from there into a tile. Padding is never stored: what
a tap reads outside ``x`` is zero in the tile. Output positions are counted through: sample, depth, height, width.
"""

from typing import Any, Final

from srigl_fx.runtime.cpu.kernels import conv
from srigl_fx.runtime.cpu.kernels.compiled import compiled
from srigl_fx.runtime.cpu.kernels.copies import copy_even_lanes, copy_lanes, copy_spread_lanes
from srigl_fx.runtime.cpu.kernels.plan import COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.vector import words

Pointer = Any
# A piece: neighbouring positions of one output row, in one vector of the tile's columns.
PIECE_COLUMN, PIECE_COUNT, PIECE_SAMPLE, PIECE_D, PIECE_H, PIECE_W, PIECE_WORDS = range(7)
MOST_PIECES: Final = COLUMNS  # of a tile: one for each column
TAP_WORDS: Final = 7
_UNREAD: Final = -1


@compiled
def cut_pieces(geometry: Pointer, first: int, columns: int, pieces: Pointer) -> int:
    """Cut the output positions from ``first`` on into pieces; returns how many there are."""
    out_d, out_h, out_w = geometry[conv.OUT_D], geometry[conv.OUT_H], geometry[conv.OUT_W]
    count = column = 0
    while column < columns:
        row, w = (first + column) // out_w, (first + column) % out_w
        length = min(LANES - column % LANES, min(out_w - w, columns - column))
        at = count * PIECE_WORDS
        pieces[at + PIECE_COLUMN], pieces[at + PIECE_COUNT] = column, length
        pieces[at + PIECE_SAMPLE], pieces[at + PIECE_D] = row // out_h // out_d, row // out_h % out_d
        pieces[at + PIECE_H], pieces[at + PIECE_W] = row % out_h, w
        column += length
        count += 1
    return count


@compiled
def source_index(geometry: Pointer, axis: int, out: int, tap: int) -> int:
    """The index of ``x`` along an axis that a tap of an output position reads, or -1 where that is padding."""
    at = out * geometry[conv.STRIDE_D + axis] + tap * geometry[conv.DILATION_D + axis] - geometry[conv.PAD_D + axis]
    spacing = geometry[conv.SPACING_D + axis]
    if at < 0 or at % spacing != 0 or at // spacing >= geometry[conv.IN_D + axis]:
        return _UNREAD
    return at // spacing  # type: ignore[no-any-return]


@compiled
def _locate(geometry: Pointer, x: int, piece: Pointer, channel: int, tap: Pointer, found: Pointer) -> None:
    """Find what one tap of one channel reads at the positions of a piece, if W has no spacing.

    Stores the address that the first lane of the piece's vector would read, and the bits of the lanes that do.
    """
    in_d, in_h, in_w = geometry[conv.IN_D], geometry[conv.IN_H], geometry[conv.IN_W]
    d = source_index(geometry, 0, piece[PIECE_D], tap[0])
    h = source_index(geometry, 1, piece[PIECE_H], tap[1])
    found[0], found[1] = x, 0
    if d != _UNREAD and h != _UNREAD:
        stride, count, lane = geometry[conv.STRIDE_W], piece[PIECE_COUNT], piece[PIECE_COLUMN] % LANES
        start = piece[PIECE_W] * stride + tap[2] * geometry[conv.DILATION_W] - geometry[conv.PAD_W]
        # The positions that read inside: 0 <= start + position * stride < in_w.
        low = min(count, max(0, (stride - 1 - start) // stride))
        high = max(low, min(count, (in_w - 1 - start) // stride + 1))
        plane = (piece[PIECE_SAMPLE] * geometry[conv.CHANNELS] + channel) * in_d + d
        found[0] = x + ((plane * in_h + h) * in_w + start - lane * stride) * 4
        found[1] = ((1 << high) - (1 << low)) << lane


@compiled
def _fill_one_by_one(
    geometry: Pointer, x: int, piece: Pointer, channel: int, channels: int, tap: Pointer, target: int, target_row: int
) -> None:
    in_d, in_h, in_w = geometry[conv.IN_D], geometry[conv.IN_H], geometry[conv.IN_W]
    d = source_index(geometry, 0, piece[PIECE_D], tap[0])
    h = source_index(geometry, 1, piece[PIECE_H], tap[1])
    plane = in_d * in_h * in_w * 4
    row = x + (piece[PIECE_SAMPLE] * geometry[conv.CHANNELS] + channel) * plane + (d * in_h + h) * in_w * 4
    for i in range(piece[PIECE_COUNT]):
        w = source_index(geometry, 2, piece[PIECE_W] + i, tap[2])
        to = target + piece[PIECE_COLUMN] * 4 + i * 4
        inside = d != _UNREAD and h != _UNREAD and w != _UNREAD
        at = row + w * 4 if inside else x
        copy_lanes(at, at, plane, to, target_row, channels, 1 if inside else 0, 0, 1)


@compiled
def fill_tap(
    geometry: Pointer,
    x: int,
    pieces: int,
    count: int,
    channel: int,
    channels: int,
    taps: int,
    target: int,
    target_row: int,
) -> None:
    """Copy what one tap reads of some channels at a tile's positions, a row of the tile for each channel.

    Args:
        geometry: The convolution.
        x: Its input's address.
        pieces: The address of what :func:`cut_pieces` wrote.
        count: How many.
        channel: The first channel.
        channels: How many.
        taps: The address of TAP_WORDS words: kd, kh, kw, and scratch.
        target: The address of the first channel's row in the tile, aligned to a cache line.
        target_row: Bytes from there to the next channel's row.
    """
    plane = geometry[conv.IN_D] * geometry[conv.IN_H] * geometry[conv.IN_W] * 4
    tap, first, second, stride = words(taps), words(taps + 24), words(taps + 40), geometry[conv.STRIDE_W]
    i = 0
    while i < count:
        piece = words(pieces + i * PIECE_WORDS * 8)
        if geometry[conv.SPACING_W] != 1:
            _fill_one_by_one(geometry, x, piece, channel, channels, tap, target, target_row)
            i += 1
            continue
        _locate(geometry, x, piece, channel, tap, first)
        lane = piece[PIECE_COLUMN] % LANES
        end = lane + piece[PIECE_COUNT]
        if stride > 2:  # lanes are too far apart for whole vectors
            to = target + (piece[PIECE_COLUMN] - lane) * 4
            written = (1 << end) - (1 << lane)
            copy_spread_lanes(first[0], stride * 4, plane, to, target_row, channels, first[1], written)
            i += 1
            continue
        second[0], second[1] = x, 0
        i += 1
        if end < LANES and i < count:
            following = words(pieces + i * PIECE_WORDS * 8)
            _locate(geometry, x, following, channel, tap, second)
            end += following[PIECE_COUNT]
            i += 1
        written = (1 << end) - (1 << lane)
        to = target + (piece[PIECE_COLUMN] - lane) * 4
        if stride == 1:
            copy_lanes(first[0], second[0], plane, to, target_row, channels, first[1], second[1], written)
        else:
            copy_even_lanes(first[0], second[0], plane, to, target_row, channels, first[1], second[1], written)
