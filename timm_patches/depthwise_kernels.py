"""Triton kernels of the depthwise convolution with TensorFlow's SAME padding, on rows of channels.

Lives here: the kernels and nothing else, as importing this file imports Triton. Who calls them, and with which block
sizes, is in depthwise_triton.py.

Activations are [B, H, W, C] in memory and weights [KH * KW, C], so that neighbouring threads read neighbouring
channels. Padding is a mask. All operands of a division are >= 0, for Triton's rounds towards zero. Only the offset of
an image takes 64 bits.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(x_ptr, weight_ptr, y_ptr, channels, height, width, out_height, out_width, pad_top, pad_left,
                   KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr,
                   BLOCK_C: tl.constexpr):
    """Compute a block of columns and channels of one output row."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(out_width, BLOCK_W)
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel_ok = channel < channels
    block = program // channel_blocks
    out_col = block % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    row = block // column_blocks
    out_row = row % out_height
    image = (row // out_height).to(tl.int64)
    x_image = x_ptr + image * height * width * channels
    y_image = y_ptr + image * out_height * out_width * channels
    out_ok = (out_col < out_width) & channel_ok
    first_row = out_row * STRIDE - pad_top
    first_col = out_col * STRIDE - pad_left
    first_x = x_image + (first_row * width + first_col) * channels + channel
    first_tap = weight_ptr + channel

    total = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    for kh in tl.static_range(KH):
        row_ok = out_ok & (first_row + kh >= 0) & (first_row + kh < height)
        for kw in tl.static_range(KW):
            in_col = first_col + kw
            ok = row_ok & (in_col >= 0) & (in_col < width)
            x = tl.load(first_x + (kh * width + kw) * channels, mask=ok, other=0.0)
            weight = tl.load(first_tap + (kh * KW + kw) * channels, mask=channel_ok, other=0.0)
            total += x.to(tl.float32) * weight.to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_image + (out_row * out_width + out_col) * channels + channel, y, mask=out_ok)


@triton.jit
def _store_cells(image_ptr, value, row, col, height, width, channel, channels):
    """Store a tile of one image where it lies inside."""
    ok = (col >= 0) & (col < width) & (row >= 0) & (row < height) & (channel < channels)
    tl.store(image_ptr + (row * width + col) * channels + channel, value.to(image_ptr.dtype.element_ty), mask=ok)


@triton.jit
def grad_input_kernel(dy_ptr, weight_ptr, dx_ptr, channels, height, width, out_height, out_width, pad_top, pad_left,
                      row_cells, col_cells, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
                      BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute a block of cells and channels of the input's gradient.

    A cell is STRIDE * STRIDE elements of the padded input, at rows STRIDE * cell_row + 0..STRIDE - 1 and columns alike.
    Its elements share the output elements that they went into, and each element has the taps of its own parity.
    row_cells and col_cells are the number of cells that touch the input.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(col_cells, BLOCK_W)
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel_ok = channel < channels
    block = program // channel_blocks
    cell_col = pad_left // STRIDE + block % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    row = block // column_blocks
    cell_row = pad_top // STRIDE + row % row_cells
    image = (row // row_cells).to(tl.int64)
    dy_image = dy_ptr + image * out_height * out_width * channels
    dx_image = dx_ptr + image * height * width * channels

    dx00 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)  # of the cell's row 0, column 0
    dx01 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    dx10 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    dx11 = tl.zeros([BLOCK_W, BLOCK_C], dtype=tl.float32)
    for i in tl.static_range((KH + STRIDE - 1) // STRIDE):
        out_row = cell_row - i
        row_ok = (out_row >= 0) & (out_row < out_height)
        for j in tl.static_range((KW + STRIDE - 1) // STRIDE):
            out_col = cell_col - j
            ok = (out_col >= 0) & (out_col < out_width) & row_ok & channel_ok
            dy = tl.load(dy_image + (out_row * out_width + out_col) * channels + channel, mask=ok, other=0.0)
            dy = dy.to(tl.float32)
            tap = weight_ptr + (STRIDE * i * KW + STRIDE * j) * channels + channel
            dx00 += dy * tl.load(tap, mask=channel_ok, other=0.0).to(tl.float32)
            if STRIDE == 2:
                if STRIDE * j + 1 < KW:
                    dx01 += dy * tl.load(tap + channels, mask=channel_ok, other=0.0).to(tl.float32)
                if STRIDE * i + 1 < KH:
                    dx10 += dy * tl.load(tap + KW * channels, mask=channel_ok, other=0.0).to(tl.float32)
                    if STRIDE * j + 1 < KW:
                        dx11 += dy * tl.load(tap + (KW + 1) * channels, mask=channel_ok, other=0.0).to(tl.float32)
    in_row = cell_row * STRIDE - pad_top
    in_col = cell_col * STRIDE - pad_left
    _store_cells(dx_image, dx00, in_row, in_col, height, width, channel, channels)
    if STRIDE == 2:
        _store_cells(dx_image, dx01, in_row, in_col + 1, height, width, channel, channels)
        _store_cells(dx_image, dx10, in_row + 1, in_col, height, width, channel, channels)
        _store_cells(dx_image, dx11, in_row + 1, in_col + 1, height, width, channel, channels)


@triton.jit
def grad_weight_kernel(x_ptr, dy_ptr, partial_ptr, channels, height, width, out_height, out_width, pad_top, pad_left,
                       units, units_per_split, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
                       TAPS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum all taps over one split of the units, for a block of channels, into partial [splits, KH * KW, C].

    A unit is a block of columns of one output row. Units go down the rows first: neighbouring ones share input rows,
    which are still in the cache. TAPS is KH * KW or more, a power of two.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(out_width, BLOCK_W)
    program = tl.program_id(0)
    first_channel = program % channel_blocks * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)[None, None, :]
    split = program // channel_blocks
    col = tl.arange(0, BLOCK_W)[None, :, None]
    tap = tl.arange(0, TAPS)[:, None, None]
    row_shift = tap // KW - pad_top
    col_shift = tap % KW - pad_left
    tap_ok = (tap < KH * KW) & (channel < channels)

    total = tl.zeros([TAPS, BLOCK_W, BLOCK_C], dtype=tl.float32)
    first = split * units_per_split
    for unit in range(first, tl.minimum(first + units_per_split, units)):
        out_row = unit % out_height
        strip = unit // out_height
        out_col = strip % column_blocks * BLOCK_W + col
        image = (strip // column_blocks).to(tl.int64)
        x_image = x_ptr + image * height * width * channels
        dy_image = dy_ptr + image * out_height * out_width * channels
        out_ok = out_col < out_width
        in_row = out_row * STRIDE + row_shift
        in_col = out_col * STRIDE + col_shift
        in_ok = (in_row >= 0) & (in_row < height) & (in_col >= 0) & (in_col < width) & out_ok & tap_ok
        dy = tl.load(dy_image + (out_row * out_width + out_col) * channels + channel,
                     mask=out_ok & (channel < channels), other=0.0)
        x = tl.load(x_image + (in_row * width + in_col) * channels + channel, mask=in_ok, other=0.0)
        total += x.to(tl.float32) * dy.to(tl.float32)

    out_tap = tl.arange(0, TAPS)[:, None]
    out_channel = first_channel + tl.arange(0, BLOCK_C)[None, :]
    tl.store(partial_ptr + (split.to(tl.int64) * (KH * KW) + out_tap) * channels + out_channel, tl.sum(total, axis=1),
             mask=(out_tap < KH * KW) & (out_channel < channels))
