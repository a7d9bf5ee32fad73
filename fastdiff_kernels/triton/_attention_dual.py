"""Attention on GPU together with its derivative along a tangent: every block of logits is made once and serves both."""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_forward import exponentials
from ._attention_tiles import existing_keys, load_rows, narrow, offset, product, store_rows


@triton.jit
def _logits(
    logits, t_logits, q, t_q, k, t_k, k_strides, t_k_strides, start, length,
    BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What one piece of the width adds to logits and to their tangents."""
    keys = tl.trans(load_rows(k, k_strides, start, length, BLOCK_N, FIRST, SIZE, WIDTH, UNIT, MASKED))
    logits = product(q, keys, logits, PRECISION, WIDEN)
    if t_q is not None:
        t_logits = product(t_q, keys, t_logits, PRECISION, WIDEN)
    if t_k is not None:
        t_keys = load_rows(t_k, t_k_strides, start, length, BLOCK_N, FIRST, SIZE, WIDTH, UNIT, MASKED)
        t_logits = product(q, tl.trans(t_keys), t_logits, PRECISION, WIDEN)
    return logits, t_logits


@triton.jit
def _values(
    out, t_out, powers, t_powers, shrink, v, t_v, v_strides, t_v_strides, start, length,
    BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One piece of the output's sums and of their tangents."""
    values = load_rows(v, v_strides, start, length, BLOCK_N, FIRST, SIZE, WIDTH, UNIT, MASKED)
    powers = narrow(powers, values, WIDEN)
    out = product(powers, values, out * shrink[:, None], PRECISION, WIDEN)
    t_out = product(narrow(t_powers, values, WIDEN), values, t_out * shrink[:, None], PRECISION, WIDEN)
    if t_v is not None:
        t_values = load_rows(t_v, t_v_strides, start, length, BLOCK_N, FIRST, SIZE, WIDTH, UNIT, MASKED)
        t_out = product(powers, t_values, t_out, PRECISION, WIDEN)
    return out, t_out


@triton.jit
def _attend(
    head, tail, t_head, t_tail, peak, total, t_total, q_head, q_tail, t_q_head, t_q_tail, k, v, t_k, t_v,
    k_strides, v_strides, t_k_strides, t_v_strides, begin, end, length, size,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over keys [begin, end) for a scale of positive size."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        logits, t_logits = _logits(
            zeros, zeros, q_head, t_q_head, k, t_k, k_strides, t_k_strides, start, length,
            BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED, PRECISION, WIDEN,
        )  # fmt: skip
        if TAIL:
            logits, t_logits = _logits(
                logits, t_logits, q_tail, t_q_tail, k, t_k, k_strides, t_k_strides, start, length,
                BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED, PRECISION, WIDEN,
            )  # fmt: skip
        powers, peak, shrink = exponentials(logits, peak, size, columns, length, MASKED, PRECISION)
        t_powers = powers * (t_logits * size)
        total = total * shrink + tl.sum(powers, 1)
        t_total = t_total * shrink + tl.sum(t_powers, 1)
        head, t_head = _values(
            head, t_head, powers, t_powers, shrink, v, t_v, v_strides, t_v_strides, start, length,
            BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED, PRECISION, WIDEN,
        )  # fmt: skip
        if TAIL:
            tail, t_tail = _values(
                tail, t_tail, powers, t_powers, shrink, v, t_v, v_strides, t_v_strides, start, length,
                BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED, PRECISION, WIDEN,
            )  # fmt: skip
    return head, tail, t_head, t_tail, peak, total, t_total


@triton.jit
def dual_kernel(
    q, k, v, key_lengths, t_q, t_k, t_v, out, lse, t_out, t_lse,
    q_strides, k_strides, v_strides, t_q_strides, t_k_strides, t_v_strides, out_strides, scale, queries, keys, heads,
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
    if t_k is not None:
        t_k += offset(t_k_strides, b, 0, h, UNIT)
    if t_v is not None:
        t_v += offset(t_v_strides, b, 0, h, UNIT)
    out += offset(out_strides, b, 0, h, UNIT)
    t_out += offset(out_strides, b, 0, h, UNIT)

    q_head = load_rows(q, q_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True)
    if NEGATIVE:
        q_head = -q_head
    q_tail = q_head
    t_q_head = None
    t_q_tail = None
    if t_q is not None:
        t_q += offset(t_q_strides, b, 0, h, UNIT)
        t_q_head = load_rows(t_q, t_q_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True)
        if NEGATIVE:
            t_q_head = -t_q_head
    head = tl.zeros([BLOCK_M, HEAD], tl.float32)
    t_head = tl.zeros([BLOCK_M, HEAD], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    t_total = tl.zeros([BLOCK_M], tl.float32)
    tail = peak
    t_tail = peak
    if TAIL:
        q_tail = load_rows(q, q_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
        if NEGATIVE:
            q_tail = -q_tail
        if t_q is not None:
            t_q_tail = load_rows(t_q, t_q_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
            if NEGATIVE:
                t_q_tail = -t_q_tail
        tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
        t_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    size = tl.abs(scale)
    head, tail, t_head, t_tail, peak, total, t_total = _attend(
        head, tail, t_head, t_tail, peak, total, t_total, q_head, q_tail, t_q_head, t_q_tail, k, v, t_k, t_v,
        k_strides, v_strides, t_k_strides, t_v_strides, 0, whole, length, size,
        HEAD, TAIL, WIDTH, UNIT, BLOCK_M, BLOCK_N, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if not EVEN:
        head, tail, t_head, t_tail, peak, total, t_total = _attend(
            head, tail, t_head, t_tail, peak, total, t_total, q_head, q_tail, t_q_head, t_q_tail, k, v, t_k, t_v,
            k_strides, v_strides, t_k_strides, t_v_strides, whole, length, length, size,
            HEAD, TAIL, WIDTH, UNIT, BLOCK_M, BLOCK_N, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean = t_total * inverse
    tl.store(lse + item * queries + rows, peak + tl.log(total), mask=rows < queries)
    tl.store(t_lse + item * queries + rows, mean, mask=rows < queries)
    _store_both(head, t_head, inverse, mean, out, t_out, out_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT)
    if TAIL:
        _store_both(tail, t_tail, inverse, mean, out, t_out, out_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT)


@triton.jit
def _store_both(
    sums, t_sums, inverse, mean, out, t_out, out_strides, start, queries,
    BLOCK_M: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    values = sums * inverse[:, None]
    store_rows(out, out_strides, start, queries, values, BLOCK_M, FIRST, SIZE, WIDTH, UNIT)
    store_rows(t_out, out_strides, start, queries, t_sums * inverse[:, None] - mean[:, None] * values, BLOCK_M, FIRST, SIZE, WIDTH, UNIT)
