"""Attention forward on GPU, one program for a block of queries of a head, and the same together with its forward-mode derivative."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import LOG2_E, existing_keys, exponential, load_rows, narrow, offset, product, store_rows


@triton.jit
def exponentials(logits, peak, scale, columns, length, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """e^(scale logits - peak) with the peak raised to the greatest of scale logits, and what earlier sums shrink by."""
    if MASKED:
        exists = (columns < length)[None, :]
        higher = tl.maximum(peak, tl.max(tl.where(exists, logits, -float("inf")), 1) * scale)
        powers = tl.where(exists, exponential(logits, scale, higher[:, None], PRECISION), 0.0)
    else:
        higher = tl.maximum(peak, tl.max(logits, 1) * scale)
        powers = exponential(logits, scale, higher[:, None], PRECISION)
    return powers, higher, tl.exp2((peak - higher) * LOG2_E)


@triton.jit
def _attend(
    head, tail, peak, total, q_head, q_tail, k, v, k_strides, v_strides, begin, end, length, scale,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over keys [begin, end), begun in `head`, `tail` (the columns of the output) and `total`."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_strides, start, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED)
        logits = product(q_head, tl.trans(keys), None, PRECISION, WIDEN)
        if TAIL:
            keys = load_rows(k, k_strides, start, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED)
            logits = product(q_tail, tl.trans(keys), logits, PRECISION, WIDEN)
        powers, peak, shrink = exponentials(logits, peak, scale, columns, length, MASKED, PRECISION)
        total = total * shrink + tl.sum(powers, 1)
        values = load_rows(v, v_strides, start, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED)
        powers = narrow(powers, values, WIDEN)
        head = product(powers, values, head * shrink[:, None], PRECISION, WIDEN)
        if TAIL:
            values = load_rows(v, v_strides, start, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED)
            tail = product(powers, values, tail * shrink[:, None], PRECISION, WIDEN)
    return head, tail, peak, total


@triton.jit
def forward_kernel(
    q, k, v, key_lengths, out, lse, q_strides, k_strides, v_strides, out_strides, scale, queries, keys, heads,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    item = program // blocks
    b, h = item // heads, item % heads
    start = (program % blocks).to(tl.int32) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    length = existing_keys(key_lengths, b, keys)
    whole = length // BLOCK_N * BLOCK_N
    q += offset(q_strides, b, 0, h, UNIT)
    k += offset(k_strides, b, 0, h, UNIT)
    v += offset(v_strides, b, 0, h, UNIT)
    out += offset(out_strides, b, 0, h, UNIT)

    q_head = load_rows(q, q_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True)
    # The greatest product is that of the greatest logit only while scale has no sign.
    if NEGATIVE:
        q_head = -q_head
    q_tail = q_head
    head = tl.zeros([BLOCK_M, HEAD], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tail = peak
    if TAIL:
        q_tail = load_rows(q, q_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
        if NEGATIVE:
            q_tail = -q_tail
        tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    scale = tl.abs(scale)
    head, tail, peak, total = _attend(
        head, tail, peak, total, q_head, q_tail, k, v, k_strides, v_strides, 0, whole, length, scale,
        HEAD, TAIL, WIDTH, UNIT, BLOCK_N, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if not EVEN:
        head, tail, peak, total = _attend(
            head, tail, peak, total, q_head, q_tail, k, v, k_strides, v_strides, whole, length, length, scale,
            HEAD, TAIL, WIDTH, UNIT, BLOCK_N, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip

    tl.store(lse + item * queries + rows, peak + tl.log(total), mask=rows < queries)
    # Without keys the sums are zero, and so is the output.
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_rows(out, out_strides, start, queries, head * inverse[:, None], BLOCK_M, 0, HEAD, WIDTH, UNIT)
    if TAIL:
        store_rows(out, out_strides, start, queries, tail * inverse[:, None], BLOCK_M, HEAD, TAIL, WIDTH, UNIT)
