"""The condensed convolution kernel, as loops over raw pointers, for one to three spatial dimensions.

Owns the arithmetic of ``CondensedConv``; the caller has validated every index and the geometry. Shapes with fewer than
three spatial dimensions are given with leading ones. A kept weight is one tap (channel, kd, kh, kw) of a filter: it
adds a shifted, strided copy of its input channel to the output plane, clipped at the borders (zero padding).
"""

from typing import Any

Pointer = Any

# Positions in the int64 geometry array that every call takes.
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
    K,
    GEOMETRY_SIZE,
) = range(23)


def fill_bias_planes(bias: Pointer, y: Pointer, batch: int, out_channels: int, plane: int) -> None:
    """Write the bias into every position of every output plane: what an ablated filter yields."""
    for b in range(batch):
        for o in range(out_channels):
            for p in range(plane):
                y[(b * out_channels + o) * plane + p] = bias[o]


def conv_rows(
    x: Pointer,
    values: Pointer,
    indices: Pointer,
    active: Pointer,
    bias: Pointer,
    y: Pointer,
    geometry: Pointer,
    sample: int,
    first: int,
    last: int,
) -> None:
    """Compute the active filters ``first <= r < last`` of one sample. ``pads`` are those before each dimension."""
    k = geometry[K]
    in_d, in_h, in_w = geometry[IN_D], geometry[IN_H], geometry[IN_W]
    out_d, out_h, out_w = geometry[OUT_D], geometry[OUT_H], geometry[OUT_W]
    kernel_h, kernel_w = geometry[KERNEL_H], geometry[KERNEL_W]
    taps = geometry[KERNEL_D] * kernel_h * kernel_w
    stride_d, stride_h, stride_w = geometry[STRIDE_D], geometry[STRIDE_H], geometry[STRIDE_W]
    channels, out_channels, groups = geometry[CHANNELS], geometry[OUT_CHANNELS], geometry[GROUPS]
    group_in = channels // groups
    group_out = out_channels // groups
    in_plane = in_d * in_h * in_w
    out_plane = out_d * out_h * out_w
    for r in range(first, last):
        o = int(active[r])
        y_base = (sample * out_channels + o) * out_plane
        x_group = (sample * channels + o // group_out * group_in) * in_plane
        for p in range(out_plane):
            y[y_base + p] = bias[o]
        for j in range(k):
            tap = int(indices[r * k + j])
            weight = values[r * k + j]
            channel = tap // taps
            rest = tap - channel * taps
            off_d = rest // (kernel_h * kernel_w) * geometry[DILATION_D] - geometry[PAD_D]
            rest = rest % (kernel_h * kernel_w)
            off_h = rest // kernel_w * geometry[DILATION_H] - geometry[PAD_H]
            off_w = rest % kernel_w * geometry[DILATION_W] - geometry[PAD_W]
            # Output positions whose input lies inside: 0 <= position * stride + offset < size.
            d0 = max(0, (-off_d + stride_d - 1) // stride_d)
            d1 = min(out_d, (in_d - 1 - off_d) // stride_d + 1)
            h0 = max(0, (-off_h + stride_h - 1) // stride_h)
            h1 = min(out_h, (in_h - 1 - off_h) // stride_h + 1)
            w0 = max(0, (-off_w + stride_w - 1) // stride_w)
            w1 = min(out_w, (in_w - 1 - off_w) // stride_w + 1)
            x_base = x_group + channel * in_plane
            for d in range(d0, d1):
                for h in range(h0, h1):
                    x_row = x_base + ((d * stride_d + off_d) * in_h + h * stride_h + off_h) * in_w + off_w
                    y_row = y_base + (d * out_h + h) * out_w
                    if stride_w == 1:
                        for w in range(w0, w1):
                            y[y_row + w] += weight * x[x_row + w]
                    else:
                        for w in range(w0, w1):
                            y[y_row + w] += weight * x[x_row + w * stride_w]
