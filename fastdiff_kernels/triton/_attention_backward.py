"""Gradients of attention on GPU in two kernels without atomics, each making the probabilities it needs again from the log-sum-exps.

`query_kernel` has a block of queries and goes through the keys; it also leaves for the other what the probabilities' gradients are moved
by to become the logits'. `key_kernel` has a block of keys and goes through the queries, with its tiles of logits transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import existing_keys, exponential, load_rows, narrow, offset, product, store_rows


@triton.jit
def _query_gradients(
    head, tail, q_head, q_tail, grad_head, grad_tail, lse, delta, k, v, k_strides, v_strides, begin, end, length, scale,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over keys [begin, end)."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, k_strides, start, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED)
        values = load_rows(v, v_strides, start, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, MASKED)
        logits = product(q_head, tl.trans(keys), None, PRECISION, WIDEN)
        gradients = product(grad_head, tl.trans(values), None, PRECISION, WIDEN)
        if TAIL:
            more_keys = load_rows(k, k_strides, start, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED)
            more_values = load_rows(v, v_strides, start, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, MASKED)
            logits = product(q_tail, tl.trans(more_keys), logits, PRECISION, WIDEN)
            gradients = product(grad_tail, tl.trans(more_values), gradients, PRECISION, WIDEN)
        probabilities = exponential(logits, scale, lse[:, None], PRECISION)
        if MASKED:
            probabilities = tl.where((columns < length)[None, :], probabilities, 0.0)
        gradients = narrow(probabilities * (gradients - delta[:, None]), keys, WIDEN)
        head = product(gradients, keys, head, PRECISION, WIDEN)
        if TAIL:
            tail = product(gradients, more_keys, tail, PRECISION, WIDEN)
    return head, tail


@triton.jit
def query_kernel(
    grad, grad_lse, q, k, v, key_lengths, out, lse, delta, grad_q,
    grad_strides, q_strides, k_strides, v_strides, out_strides, grad_q_strides, scale, queries, keys, heads,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    item = program // blocks
    b, h = item // heads, item % heads
    start = (program % blocks).to(tl.int32) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    at = item * queries + rows
    grad += offset(grad_strides, b, 0, h, UNIT)
    out += offset(out_strides, b, 0, h, UNIT)
    grad_head = load_rows(grad, grad_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True)
    grad_tail = grad_head
    moved = tl.sum(
        grad_head.to(tl.float32) * load_rows(out, out_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True).to(tl.float32), 1
    )
    if TAIL:
        grad_tail = load_rows(grad, grad_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
        more = load_rows(out, out_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
        moved += tl.sum(grad_tail.to(tl.float32) * more.to(tl.float32), 1)
    if grad_lse is not None:
        moved -= tl.load(grad_lse + at, mask=rows < queries, other=0.0)
    tl.store(delta + at, moved, mask=rows < queries)

    if grad_q is not None:
        length = existing_keys(key_lengths, b, keys)
        whole = length // BLOCK_N * BLOCK_N
        q += offset(q_strides, b, 0, h, UNIT)
        k += offset(k_strides, b, 0, h, UNIT)
        v += offset(v_strides, b, 0, h, UNIT)
        grad_q += offset(grad_q_strides, b, 0, h, UNIT)
        log_sums = tl.load(lse + at, mask=rows < queries, other=0.0)
        q_head = load_rows(q, q_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, True)
        head = tl.zeros([BLOCK_M, HEAD], tl.float32)
        q_tail = q_head
        tail = moved
        if TAIL:
            q_tail = load_rows(q, q_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, True)
            tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
        head, tail = _query_gradients(
            head, tail, q_head, q_tail, grad_head, grad_tail, log_sums, moved, k, v, k_strides, v_strides, 0, whole, length,
            scale, HEAD, TAIL, WIDTH, UNIT, BLOCK_N, False, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
        if not EVEN:
            head, tail = _query_gradients(
                head, tail, q_head, q_tail, grad_head, grad_tail, log_sums, moved, k, v, k_strides, v_strides, whole, length, length,
                scale, HEAD, TAIL, WIDTH, UNIT, BLOCK_N, True, PRECISION, WIDEN, STAGES,
            )  # fmt: skip
        store_rows(grad_q, grad_q_strides, start, queries, head * scale, BLOCK_M, 0, HEAD, WIDTH, UNIT)
        if TAIL:
            store_rows(grad_q, grad_q_strides, start, queries, tail * scale, BLOCK_M, HEAD, TAIL, WIDTH, UNIT)


@triton.jit
def _key_gradients(
    k_sums, k_more, v_sums, v_more, k_head, k_tail, v_head, v_tail,
    q, grad, q_strides, grad_strides, lse, delta, begin, end, queries, scale,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums over queries [begin, end)."""
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        q_rows = load_rows(q, q_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, MASKED)
        grads = load_rows(grad, grad_strides, start, queries, BLOCK_M, 0, HEAD, WIDTH, UNIT, MASKED)
        logits = product(k_head, tl.trans(q_rows), None, PRECISION, WIDEN)
        if TAIL:
            more_q = load_rows(q, q_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, MASKED)
            more_grads = load_rows(grad, grad_strides, start, queries, BLOCK_M, HEAD, TAIL, WIDTH, UNIT, MASKED)
            logits = product(k_tail, tl.trans(more_q), logits, PRECISION, WIDEN)
        if MASKED:
            # Rows that do not exist get no probability.
            log_sums = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
            moved = tl.load(delta + rows, mask=rows < queries, other=0.0)
        else:
            log_sums = tl.load(lse + rows)
            moved = tl.load(delta + rows)
        probabilities = exponential(logits, scale, log_sums[None, :], PRECISION)
        if WANT_V:
            narrowed = narrow(probabilities, grads, WIDEN)
            v_sums = product(narrowed, grads, v_sums, PRECISION, WIDEN)
            if TAIL:
                v_more = product(narrowed, more_grads, v_more, PRECISION, WIDEN)
        if WANT_K:
            gradients = product(v_head, tl.trans(grads), None, PRECISION, WIDEN)
            if TAIL:
                gradients = product(v_tail, tl.trans(more_grads), gradients, PRECISION, WIDEN)
            gradients = narrow(probabilities * (gradients - moved[None, :]), q_rows, WIDEN)
            k_sums = product(gradients, q_rows, k_sums, PRECISION, WIDEN)
            if TAIL:
                k_more = product(gradients, more_q, k_more, PRECISION, WIDEN)
    return k_sums, k_more, v_sums, v_more


@triton.jit
def key_kernel(
    grad, q, k, v, key_lengths, lse, delta, grad_k, grad_v,
    grad_strides, q_strides, k_strides, v_strides, out_strides, scale, queries, keys, heads,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    item = program // blocks
    b, h = item // heads, item % heads
    first = (program % blocks).to(tl.int32) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    length = existing_keys(key_lengths, b, keys)
    # No query reaches a block of padding.
    end = tl.where(first < length, queries, 0)
    whole = end // BLOCK_M * BLOCK_M
    grad += offset(grad_strides, b, 0, h, UNIT)
    q += offset(q_strides, b, 0, h, UNIT)
    k += offset(k_strides, b, 0, h, UNIT)
    v += offset(v_strides, b, 0, h, UNIT)
    lse += item * queries
    delta += item * queries
    k_head = load_rows(k, k_strides, first, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, True)
    v_head = load_rows(v, v_strides, first, length, BLOCK_N, 0, HEAD, WIDTH, UNIT, True)
    k_sums = tl.zeros([BLOCK_N, HEAD], tl.float32)
    v_sums = tl.zeros([BLOCK_N, HEAD], tl.float32)
    k_tail = k_head
    v_tail = v_head
    k_more = columns
    v_more = columns
    if TAIL:
        k_tail = load_rows(k, k_strides, first, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, True)
        v_tail = load_rows(v, v_strides, first, length, BLOCK_N, HEAD, TAIL, WIDTH, UNIT, True)
        k_more = tl.zeros([BLOCK_N, TAIL], tl.float32)
        v_more = tl.zeros([BLOCK_N, TAIL], tl.float32)
    k_sums, k_more, v_sums, v_more = _key_gradients(
        k_sums, k_more, v_sums, v_more, k_head, k_tail, v_head, v_tail,
        q, grad, q_strides, grad_strides, lse, delta, 0, whole, queries,
        scale, grad_k is not None, grad_v is not None, HEAD, TAIL, WIDTH, UNIT, BLOCK_M, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if not EVEN:
        k_sums, k_more, v_sums, v_more = _key_gradients(
            k_sums, k_more, v_sums, v_more, k_head, k_tail, v_head, v_tail,
            q, grad, q_strides, grad_strides, lse, delta, whole, end, queries,
            scale, grad_k is not None, grad_v is not None, HEAD, TAIL, WIDTH, UNIT, BLOCK_M, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip

    # A row of padding has been given probabilities as if its key were zero.
    exists = (columns < length)[:, None]
    at = offset(out_strides, b, 0, h, UNIT)
    if grad_k is not None:
        store_rows(grad_k + at, out_strides, first, keys, tl.where(exists, k_sums * scale, 0.0), BLOCK_N, 0, HEAD, WIDTH, UNIT)
        if TAIL:
            store_rows(grad_k + at, out_strides, first, keys, tl.where(exists, k_more * scale, 0.0), BLOCK_N, HEAD, TAIL, WIDTH, UNIT)
    if grad_v is not None:
        store_rows(grad_v + at, out_strides, first, keys, tl.where(exists, v_sums, 0.0), BLOCK_N, 0, HEAD, WIDTH, UNIT)
        if TAIL:
            store_rows(grad_v + at, out_strides, first, keys, tl.where(exists, v_more, 0.0), BLOCK_N, HEAD, TAIL, WIDTH, UNIT)
