"""The condensed convolution kernel, as loops over raw pointers, for one to three spatial dimensions.

Owns the arithmetic of ``CondensedConv``; the caller has validated every index and the geometry. Shapes with fewer than
three spatial dimensions are given with leading ones. A sample is packed first: padded with zeros, and cut into planes
so that every kept weight, a tap (channel, kd, kh, kw) of a filter, is one flat offset into it, to which the flat output
positions are added. The packed rows are longer than the output's; what is computed in between is not stored.

A transposed convolution is one over the input with zeros between its elements (SPACING is their distance, ones
otherwise) whose kernel is FLIPPED.

Along a dimension, plane ``q`` holds the padded input's positions ``q, q + stride, ...``, and a tap reads it from
``tap * dilation // stride`` on; or, where that is smaller, each tap has a plane of just the positions that it reads.
"""

from typing import Any

from srigl_fx.runtime.cpu.kernels.plan import LANES

Pointer = Any
BLOCK = 512  # positions computed at a time: accumulators and inputs stay in the first-level cache
ACCUMULATORS = BLOCK + LANES  # floats of scratch

# Positions in the int64 geometry array that every call takes; those after K are filled in by ``conv_plan``.
(
    CHANNELS,
    OUT_CHANNELS,
    GROUPS,
    IN_D,
    IN_H,
    IN_W,
    OUT_D,
    OUT_H,
    OUT_W,
    KERNEL_D,
    KERNEL_H,
    KERNEL_W,
    STRIDE_D,
    STRIDE_H,
    STRIDE_W,
    PAD_D,
    PAD_H,
    PAD_W,
    DILATION_D,
    DILATION_H,
    DILATION_W,
    SPACING_D,
    SPACING_H,
    SPACING_W,
    FLIPPED,
    K,
    PLANES_D,
    PLANES_H,
    PLANES_W,
    PACKED_D,
    PACKED_H,
    PACKED_W,
    PLANE_STEP_D,
    PLANE_STEP_H,
    PLANE_STEP_W,
    POINTWISE,
    DIRECT,
    GEOMETRY_SIZE,
) = range(38)


def conv_plan(geometry: Pointer) -> None:
    """Choose the packed layout of every dimension: the number of planes, their size, and the distance of their starts.

    A packed sample has CHANNELS * PLANES_D * PLANES_H * PLANES_W * PACKED_D * PACKED_H * PACKED_W elements, never more
    than channels, taps and output positions multiply to, and then zeros: it ends (size // LANES + 2) * LANES floats
    after its start. Axes that can be taken for one are: their sizes and settings in ``geometry`` change, those of
    memory do not. A convolution that is POINTWISE (each position reads just its own) becomes one of a single row;
    DIRECT is then 1 if ``x`` is read as it is.
    """
    geometry[DIRECT] = 0
    # Twice, since what H and W became may be one with D.
    for _ in range(2):
        # Where a filter is one wide, and every position reads its own column, the columns of a row are neighbours of
        # those of the next row for each tap: both axes are one, so that its vectors are full however narrow W is.
        columns = geometry[IN_W]
        alone = geometry[KERNEL_W] * geometry[STRIDE_W] * geometry[SPACING_W] == 1 and geometry[PAD_W] == 0
        steps = geometry[STRIDE_H] * geometry[SPACING_H]
        if alone and geometry[OUT_W] == columns and (columns == 1 or steps == 1):
            geometry[IN_W], geometry[OUT_W] = geometry[IN_H] * columns, geometry[OUT_H] * columns
            geometry[PAD_W], geometry[DILATION_W] = geometry[PAD_H] * columns, geometry[DILATION_H] * columns
            geometry[KERNEL_W], geometry[STRIDE_W] = geometry[KERNEL_H], geometry[STRIDE_H]
            geometry[SPACING_W] = geometry[SPACING_H]
            for field in (IN_H, OUT_H, PAD_H, DILATION_H, KERNEL_H, STRIDE_H, SPACING_H):
                geometry[field] = geometry[field - 1]
                geometry[field - 1] = 0 if field == PAD_H else 1
    pointwise = True
    for axis in range(3):
        steps = geometry[KERNEL_D + axis] * geometry[STRIDE_D + axis] * geometry[SPACING_D + axis]
        # Equal sizes do not tell: a transposed convolution may cut at the front what it adds at the end.
        if steps > 1 or geometry[PAD_D + axis] != 0 or geometry[IN_D + axis] != geometry[OUT_D + axis]:
            pointwise = False
    geometry[POINTWISE] = pointwise
    if pointwise:
        positions = geometry[OUT_D] * geometry[OUT_H] * geometry[OUT_W]
        for axis in range(3):
            geometry[IN_D + axis] = geometry[OUT_D + axis] = positions if axis == 2 else 1
        if positions % LANES == 0:
            geometry[DIRECT] = 1
    for axis in range(3):
        kernel, stride = geometry[KERNEL_D + axis], geometry[STRIDE_D + axis]
        dilation, out = geometry[DILATION_D + axis], geometry[OUT_D + axis]
        size = (kernel - 1) * dilation // stride + out
        by_tap = kernel * out <= stride * size
        geometry[PLANES_D + axis] = kernel if by_tap else stride
        geometry[PACKED_D + axis] = out if by_tap else size
        geometry[PLANE_STEP_D + axis] = dilation if by_tap else 1


def conv_tap_offsets(offsets: Pointer, geometry: Pointer) -> None:
    """Write where in a packed group every tap (channel, kd, kh, kw) starts to read, as int64."""
    kernel_d, kernel_h, kernel_w = geometry[KERNEL_D], geometry[KERNEL_H], geometry[KERNEL_W]
    planes_d, planes_h, planes_w = geometry[PLANES_D], geometry[PLANES_H], geometry[PLANES_W]
    packed_d, packed_h, packed_w = geometry[PACKED_D], geometry[PACKED_H], geometry[PACKED_W]
    packed = packed_d * packed_h * packed_w
    taps = kernel_d * kernel_h * kernel_w
    t = 0
    for d in range(kernel_d):
        at_d = d * geometry[DILATION_D] // geometry[PLANE_STEP_D]
        for h in range(kernel_h):
            at_h = h * geometry[DILATION_H] // geometry[PLANE_STEP_H]
            for w in range(kernel_w):
                at_w = w * geometry[DILATION_W] // geometry[PLANE_STEP_W]
                plane = (at_d % planes_d * planes_h + at_h % planes_h) * planes_w + at_w % planes_w
                shift = (at_d // planes_d * packed_h + at_h // planes_h) * packed_w + at_w // planes_w
                offset = plane * packed + shift
                tap = taps - 1 - t if geometry[FLIPPED] else t
                for channel in range(geometry[CHANNELS] // geometry[GROUPS]):
                    offsets[channel * taps + tap] = offset + channel * planes_d * planes_h * planes_w * packed
                t += 1


def conv_pack(
    x: Pointer, packed: Pointer, geometry: Pointer, sample: int, first: int, last: int, nothing: float
) -> None:
    """Pack the channels ``first <= c < last`` of one sample, and what follows the last one: ``nothing``, as padding."""
    channels = geometry[CHANNELS]
    in_d, in_h, in_w = geometry[IN_D], geometry[IN_H], geometry[IN_W]
    stride_d, stride_h, stride_w = geometry[STRIDE_D], geometry[STRIDE_H], geometry[STRIDE_W]
    spacing_d, spacing_h, spacing_w = geometry[SPACING_D], geometry[SPACING_H], geometry[SPACING_W]
    planes_d, planes_h, planes_w = geometry[PLANES_D], geometry[PLANES_H], geometry[PLANES_W]
    packed_d, packed_h, packed_w = geometry[PACKED_D], geometry[PACKED_H], geometry[PACKED_W]
    channel_size = planes_d * planes_h * planes_w * packed_d * packed_h * packed_w
    x_end = (sample + 1) * channels * in_d * in_h * in_w
    to_end = last * channel_size
    to = first * channel_size
    for c in range(first, last):
        x_base = (sample * channels + c) * in_d * in_h * in_w
        for plane_d in range(planes_d):
            start_d = plane_d * geometry[PLANE_STEP_D] - geometry[PAD_D]
            for plane_h in range(planes_h):
                start_h = plane_h * geometry[PLANE_STEP_H] - geometry[PAD_H]
                for plane_w in range(planes_w):
                    start_w = plane_w * geometry[PLANE_STEP_W] - geometry[PAD_W]
                    # The packed columns whose input lies inside: 0 <= column * stride + start < size.
                    w0 = min(packed_w, max(0, (-start_w + stride_w - 1) // stride_w))
                    w1 = max(w0, min(packed_w, (in_w - 1 - start_w) // stride_w + 1))
                    for d in range(packed_d):
                        # Divisions take as long as copying a row does: there are none where there is no spacing.
                        at_d = d * stride_d + start_d
                        inside_d = at_d >= 0
                        if spacing_d > 1:
                            inside_d, at_d = inside_d and at_d % spacing_d == 0, at_d // spacing_d
                        inside_d = inside_d and at_d < in_d
                        for h in range(packed_h):
                            at_h = h * stride_h + start_h
                            inside = inside_d and at_h >= 0
                            if spacing_h > 1:
                                inside, at_h = inside and at_h % spacing_h == 0, at_h // spacing_h
                            if not inside or at_h >= in_h:
                                for w in range(packed_w):
                                    packed[to + w] = nothing
                            elif spacing_w > 1:
                                x_row = x_base + (at_d * in_h + at_h) * in_w
                                for w in range(packed_w):
                                    at_w = w * stride_w + start_w
                                    value = nothing
                                    if at_w >= 0 and at_w % spacing_w == 0 and at_w // spacing_w < in_w:
                                        value = x[x_row + at_w // spacing_w]
                                    packed[to + w] = value
                            else:
                                for w in range(w0):
                                    packed[to + w] = nothing
                                x_row = x_base + (at_d * in_h + at_h) * in_w + start_w
                                if stride_w == 1:
                                    # Whole vectors if both ends hold them: what is too much is written over next.
                                    count = (w1 - w0 + LANES - 1) // LANES * LANES
                                    if x_row + w0 + count > x_end or to + w0 + count > to_end:
                                        count = w1 - w0
                                    for w in range(count):
                                        packed[to + w0 + w] = x[x_row + w0 + w]
                                else:
                                    for w in range(w0, w1):
                                        packed[to + w] = x[x_row + w * stride_w]
                                for w in range(w1, packed_w):
                                    packed[to + w] = nothing
                            to += packed_w
    if last == channels:
        for i in range(to_end, (to_end // LANES + 2) * LANES):
            packed[i] = nothing


def conv_rows(
    packed: Pointer,
    values: Pointer,
    indices: Pointer,
    active: Pointer,
    bias: Pointer,
    y: Pointer,
    geometry: Pointer,
    offsets: Pointer,
    accumulators: Pointer,
    sample: int,
    first: int,
    last: int,
    index_rows: Pointer,
    shared: bool,
) -> None:
    """Compute the active filters ``first <= r < last`` of one packed sample.

    ``packed`` is that sample, or all of ``x`` if the plan is DIRECT; ``offsets`` are those of ``conv_tap_offsets``, and
    ``accumulators`` is scratch for ACCUMULATORS floats. If filters share their indices, as ``shared`` says,
    ``index_rows`` holds the row of ``indices`` that each reads.
    """
    k = geometry[K]
    out_d, out_h, out_w = geometry[OUT_D], geometry[OUT_H], geometry[OUT_W]
    packed_h, packed_w = geometry[PACKED_H], geometry[PACKED_W]
    out_channels, groups = geometry[OUT_CHANNELS], geometry[GROUPS]
    planes = geometry[PLANES_D] * geometry[PLANES_H] * geometry[PLANES_W]
    group_size = geometry[CHANNELS] // groups * planes * geometry[PACKED_D] * packed_h * packed_w
    group_out = out_channels // groups
    out_plane = out_d * out_h * out_w
    packed_start = sample * groups * group_size if geometry[DIRECT] else 0
    positions = ((out_d - 1) * packed_h + out_h - 1) * packed_w + out_w
    for begin in range(0, positions, BLOCK):
        end = min(positions, begin + BLOCK)
        length = (end - begin + LANES - 1) // LANES * LANES
        for r in range(first, last):
            o = int(active[r])
            base = packed_start + o // group_out * group_size + begin
            start = bias[o]
            for p in range(length):
                accumulators[p] = start
            j0 = int(index_rows[r]) * k if shared else r * k
            j1, ahead = j0 + k, r * k - j0
            while j1 - j0 > 1 and indices[j1 - 1] == indices[j1 - 2]:  # padding
                j1 -= 1
            whole = j0 + (j1 - j0) // 4 * 4
            for j in range(j0, whole, 4):
                at = j + ahead
                v0, v1, v2, v3 = values[at], values[at + 1], values[at + 2], values[at + 3]
                x0 = base + offsets[int(indices[j])]
                x1 = base + offsets[int(indices[j + 1])]
                x2 = base + offsets[int(indices[j + 2])]
                x3 = base + offsets[int(indices[j + 3])]
                for p in range(length):
                    accumulators[p] += (
                        v0 * packed[x0 + p] + v1 * packed[x1 + p] + v2 * packed[x2 + p] + v3 * packed[x3 + p]
                    )
            for j in range(whole, j1):
                v0 = values[j + ahead]
                x0 = base + offsets[int(indices[j])]
                for p in range(length):
                    accumulators[p] += v0 * packed[x0 + p]
            y_base = (sample * out_channels + o) * out_plane
            y_end = y_base + out_plane
            for row in range(begin // packed_w, (end - 1) // packed_w + 1):
                d = row // packed_h
                h = row - d * packed_h
                if h < out_h:
                    w = max(0, begin - row * packed_w)
                    source = row * packed_w - begin + w
                    target = y_base + (d * out_h + h) * out_w + w
                    count = min(out_w, end - row * packed_w) - w
                    # Whole vectors if the plane holds them: what is too much is written over by later rows.
                    rounded = (count + LANES - 1) // LANES * LANES
                    if target + rounded <= y_end:
                        count = rounded
                    for p in range(count):
                        y[target + p] = accumulators[source + p]
