# mypy: disable-error-code="assignment"
# (Triton unrolls the loops in which tuples of chunks grow.)
"""Kernels of the modulation family: one forward and one backward for all four ops, told apart by which operands are None.

A tile is ROWS rows of CHANNELS elements, held as chunks of CHUNK columns: any width is then a few powers of two, of which at most the last
is masked, and the launcher can give each thread 16 bytes of each chunk and each row as few threads as its registers allow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import widen


@triton.jit
def _columns(k: tl.constexpr, inside, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of chunk k, and where they lie in the tensor; `inside` tells which rows do."""
    columns = (k * CHUNK + tl.arange(0, CHUNK))[None, :]
    if (k + 1) * CHUNK > CHANNELS:
        inside = inside & (columns < CHANNELS)
    return columns, inside


@triton.jit
def _chunk(pointer, strides, b, n, columns, mask, AGAIN: tl.constexpr):
    """A chunk of an activation at tokens n of samples b, as it is stored; zero where the operand is None.

    AGAIN: whether it has been read before, which the compiler is not to notice, since it would keep the chunk in registers meanwhile.
    """
    chunk = 0.0
    if pointer is not None:
        at = pointer + b * strides[0] + n * strides[1] + columns * strides[2]
        chunk = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first" if AGAIN else "")
    return chunk


@triton.jit
def _read(pointer, strides, b, n, inside, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks of an activation at tokens n of samples b; none where the operand is None."""
    chunks = ()
    if pointer is not None:
        for k in tl.static_range((CHANNELS + CHUNK - 1) // CHUNK):
            columns, mask = _columns(k, inside, CHANNELS, CHUNK)
            chunks += (_chunk(pointer, strides, b, n, columns, mask, False),)
    return chunks


@triton.jit
def _modulation(
    pointer, strides, table, table_strides, row: tl.constexpr, b, n, columns, mask, otherwise: tl.constexpr, AGAIN: tl.constexpr = False
):
    """A chunk of a modulation, widened, with the table's row added. Many rows read the same, so it should stay in the cache.

    AGAIN as for _chunk.
    """
    if pointer is None:
        chunk = otherwise
    else:
        at = pointer + b * strides[0] + n * strides[1] + columns * strides[2]
        chunk = widen(tl.load(at, mask=mask, other=0.0, eviction_policy="" if AGAIN else "evict_last"))
    if table is not None:
        at = table + row * table_strides[0] + columns * table_strides[1]
        chunk += widen(tl.load(at, mask=mask, other=0.0, eviction_policy="" if AGAIN else "evict_last"))
    return chunk


@triton.jit
def _gates(gate, strides, table, table_strides, b, n, inside, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks of the gate, with the table's first row added; ones where there is no gate."""
    chunks = ()
    for k in tl.static_range((CHANNELS + CHUNK - 1) // CHUNK):
        columns, mask = _columns(k, inside, CHANNELS, CHUNK)
        chunks += (_modulation(gate, strides, table if gate is not None else None, table_strides, 0, b, n, columns, mask, 1.0),)
    return chunks


@triton.jit
def _statistics(h, inside, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """Mean and inverse deviation of rows given by chunks, which are zero beyond the tensor; the mean of an RMS norm is 0."""
    mean = 0.0
    if CENTRED:
        total = h[0]
        for k in tl.static_range(1, (CHANNELS + CHUNK - 1) // CHUNK):
            total += h[k]
        mean = tl.sum(total, 1)[:, None] / CHANNELS
    squares = tl.zeros_like(h[0])
    for k in tl.static_range((CHANNELS + CHUNK - 1) // CHUNK):
        _, mask = _columns(k, inside, CHANNELS, CHUNK)
        centred = tl.where(mask, h[k] - mean, 0.0) if CENTRED else h[k]
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 1)[:, None] / CHANNELS + EPS)


@triton.jit
def _hidden(x, branch, gates, CHUNKS: tl.constexpr):
    """The chunks of x + gate * branch, or of x, widened."""
    h = ()
    for k in tl.static_range(CHUNKS):
        part = widen(x[k])
        if len(branch) > 0:
            part += gates[k] * widen(branch[k])
        h += (part,)
    return h


@triton.jit
def _put(pointer, chunks, at, inside, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """Writes rows given by chunks, where they are wanted."""
    if pointer is not None:
        for k in tl.static_range((CHANNELS + CHUNK - 1) // CHUNK):
            columns, mask = _columns(k, inside, CHANNELS, CHUNK)
            tl.store(pointer + at + columns, chunks[k], mask=mask)


# Loads of activations come before stores: the compiler cannot tell that they do not overlap, and would wait for one chunk to load the next.


@triton.jit
def _forward_kernel(
    x, branch, gate, weight, shift, scale, table, hidden_out, modulated_out,
    x_strides, branch_strides, gate_strides, weight_strides, shift_strides, scale_strides, table_strides,
    rows, tokens,
    CHANNELS: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """FIRST is the table's row for shift, before that for scale."""
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    b, n = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    start = row.to(tl.int64) * CHANNELS
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    read_x = _read(x, x_strides, b, n, inside, CHANNELS, CHUNK)
    read_branch = _read(branch, branch_strides, b, n, inside, CHANNELS, CHUNK)
    gates = ()
    if branch is not None:
        gates = _gates(gate, gate_strides, table, table_strides, b, n, inside, CHANNELS, CHUNK)
    h = _hidden(read_x, read_branch, gates, CHUNKS)
    _put(hidden_out, h, start, inside, CHANNELS, CHUNK)
    if modulated_out is not None:
        mean, inverse_deviation = _statistics(h, inside, CHANNELS, CHUNK, EPS, CENTRED)
        # One chunk of modulation at a time: it comes from the cache, and fewer registers keep more rows under way.
        for k in tl.static_range(CHUNKS):
            columns, mask = _columns(k, inside, CHANNELS, CHUNK)
            factors = 1.0 + _modulation(scale, scale_strides, table, table_strides, FIRST + 1, b, n, columns, mask, 0.0)
            factors *= _modulation(weight, weight_strides, None, table_strides, 0, b, n, columns, mask, 1.0)
            shifts = _modulation(shift, shift_strides, table, table_strides, FIRST, b, n, columns, mask, 0.0)
            tl.store(modulated_out + start + columns, (h[k] - mean) * inverse_deviation * factors + shifts, mask=mask)


@triton.jit
def _zeros(SLOT: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """What sums start from; nothing where no sum is wanted."""
    sums = ()
    if SLOT >= 0:
        for _ in tl.static_range(CHUNKS):
            sums += (tl.zeros([ROWS, CHUNK], ACCUMULATOR),)
    return sums


@triton.jit
def _put_sums(partial, sums, SLOT: tl.constexpr, program, programs, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """The program's sums over its rows, in their slot of partial [slots, programs, CHANNELS]."""
    if SLOT >= 0:
        for k in tl.static_range((CHANNELS + CHUNK - 1) // CHUNK):
            columns = k * CHUNK + tl.arange(0, CHUNK)
            tl.store(partial + (SLOT * programs + program) * CHANNELS + columns, tl.sum(sums[k], 0), mask=columns < CHANNELS)


@triton.jit
def _add(sums, terms, SLOT: tl.constexpr, CHUNKS: tl.constexpr):
    """sums + terms where a sum is wanted."""
    added = ()
    if SLOT >= 0:
        for k in tl.static_range(CHUNKS):
            added += (sums[k] + terms[k],)
    return added


@triton.jit
def _backward_kernel(
    grad_hidden, grad_modulated, x, branch, gate, weight, scale, table,
    grad_x, grad_branch, grad_gate, grad_shift, grad_scale, partial,
    grad_hidden_strides, grad_modulated_strides, x_strides, branch_strides, gate_strides, weight_strides, scale_strides, table_strides,
    tokens, programs,
    CHANNELS: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr, FIRST: tl.constexpr,
    GATE: tl.constexpr, WEIGHT: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ACCUMULATOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """GATE, WEIGHT, SHIFT and SCALE are the slots of their sums over rows, -1 for none.

    A WIDE row fills the registers: it is read when needed, some of it twice, the second time from the cache. Otherwise it is read once,
    and the next rows are under way while these are worked on.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, ROWS_PER_PROGRAM)
    b = program // blocks
    begin = program % blocks * ROWS_PER_PROGRAM
    stop = tl.minimum(begin + ROWS_PER_PROGRAM, tokens)
    first = begin + tl.arange(0, ROWS)[:, None]
    CHUNKS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
    gate_sums = _zeros(GATE, CHUNKS, ROWS, CHUNK, ACCUMULATOR)
    weight_sums = _zeros(WEIGHT, CHUNKS, ROWS, CHUNK, ACCUMULATOR)
    shift_sums = _zeros(SHIFT, CHUNKS, ROWS, CHUNK, ACCUMULATOR)
    scale_sums = _zeros(SCALE, CHUNKS, ROWS, CHUNK, ACCUMULATOR)
    if not WIDE:
        next_x = _read(x, x_strides, b, first, first < stop, CHANNELS, CHUNK)
        next_branch = _read(branch, branch_strides, b, first, first < stop, CHANNELS, CHUNK)
        next_modulated = _read(grad_modulated, grad_modulated_strides, b, first, first < stop, CHANNELS, CHUNK)
        next_hidden = _read(grad_hidden, grad_hidden_strides, b, first, first < stop, CHANNELS, CHUNK)
    for step in range(0, ROWS_PER_PROGRAM, ROWS):
        n = first + step
        inside = n < stop
        at = (b * tokens + n) * CHANNELS
        gates = ()
        if not WIDE:
            read_x, read_branch, read_modulated, read_hidden = next_x, next_branch, next_modulated, next_hidden
            next_x = _read(x, x_strides, b, n + ROWS, n + ROWS < stop, CHANNELS, CHUNK)
            next_branch = _read(branch, branch_strides, b, n + ROWS, n + ROWS < stop, CHANNELS, CHUNK)
            next_modulated = _read(grad_modulated, grad_modulated_strides, b, n + ROWS, n + ROWS < stop, CHANNELS, CHUNK)
            next_hidden = _read(grad_hidden, grad_hidden_strides, b, n + ROWS, n + ROWS < stop, CHANNELS, CHUNK)
            if branch is not None:
                gates = _gates(gate, gate_strides, table, table_strides, b, n, inside, CHANNELS, CHUNK)
        if grad_modulated is not None:
            if WIDE:
                h = ()
                for k in tl.static_range(CHUNKS):
                    columns, mask = _columns(k, inside, CHANNELS, CHUNK)
                    part = widen(_chunk(x, x_strides, b, n, columns, mask, False))
                    if branch is not None:
                        of_gate = table if gate is not None else None
                        factor = _modulation(gate, gate_strides, of_gate, table_strides, 0, b, n, columns, mask, 1.0)
                        part += factor * widen(_chunk(branch, branch_strides, b, n, columns, mask, False))
                    h += (part,)
            else:
                h = _hidden(read_x, read_branch, gates, CHUNKS)
            mean, inverse_deviation = _statistics(h, inside, CHANNELS, CHUNK, EPS, CENTRED)
            shift_terms, scale_terms, weight_terms, upstream = (), (), (), ()
            constants = tl.zeros([ROWS, CHUNK], ACCUMULATOR)
            alongs = tl.zeros([ROWS, CHUNK], ACCUMULATOR)
            for k in tl.static_range(CHUNKS):
                # The upstream gradient is zero beyond the tensor, and with it all that is summed here.
                columns, mask = _columns(k, inside, CHANNELS, CHUNK)
                up = widen(_chunk(grad_modulated, grad_modulated_strides, b, n, columns, mask, False) if WIDE else read_modulated[k])
                weights = _modulation(weight, weight_strides, None, table_strides, 0, b, n, columns, mask, 1.0)
                factors = 1.0 + _modulation(scale, scale_strides, table, table_strides, FIRST + 1, b, n, columns, mask, 0.0)
                normal = (h[k] - mean) * inverse_deviation
                shift_terms += (up,)
                scale_terms += (up * normal * weights,)
                up *= factors
                weight_terms += (up * normal,)
                up *= weights
                constants += up
                alongs += up * normal
                upstream += (up,)
            shift_sums = _add(shift_sums, shift_terms, SHIFT, CHUNKS)
            scale_sums = _add(scale_sums, scale_terms, SCALE, CHUNKS)
            weight_sums = _add(weight_sums, weight_terms, WEIGHT, CHUNKS)
            _put(grad_shift, shift_terms, at, inside, CHANNELS, CHUNK)
            _put(grad_scale, scale_terms, at, inside, CHANNELS, CHUNK)
            constant = tl.sum(constants, 1)[:, None] / CHANNELS if CENTRED else 0.0
            along = tl.sum(alongs, 1)[:, None] / CHANNELS
        gate_terms = ()
        for k in tl.static_range(CHUNKS):
            columns, mask = _columns(k, inside, CHANNELS, CHUNK)
            grad = 0.0
            if grad_hidden is not None:
                grad += widen(_chunk(grad_hidden, grad_hidden_strides, b, n, columns, mask, False) if WIDE else read_hidden[k])
            if grad_modulated is not None:
                if WIDE:
                    up = widen(_chunk(grad_modulated, grad_modulated_strides, b, n, columns, mask, True))
                    up *= 1.0 + _modulation(scale, scale_strides, table, table_strides, FIRST + 1, b, n, columns, mask, 0.0, AGAIN=True)
                    up *= _modulation(weight, weight_strides, None, table_strides, 0, b, n, columns, mask, 1.0, AGAIN=True)
                else:
                    up = upstream[k]
                grad += inverse_deviation * (up - constant - (h[k] - mean) * inverse_deviation * along)
            if grad_x is not None:
                tl.store(grad_x + at + columns, grad, mask=mask)
            if grad_branch is not None:
                if WIDE:
                    of_gate = table if gate is not None else None
                    factor = _modulation(gate, gate_strides, of_gate, table_strides, 0, b, n, columns, mask, 1.0, AGAIN=True)
                else:
                    factor = gates[k]
                tl.store(grad_branch + at + columns, grad * factor, mask=mask)
            if grad_gate is not None or GATE >= 0:
                # The branch is zero beyond the tensor.
                branches = widen(_chunk(branch, branch_strides, b, n, columns, mask, True) if WIDE else read_branch[k])
                gate_terms += (grad * branches,)
        gate_sums = _add(gate_sums, gate_terms, GATE, CHUNKS)
        _put(grad_gate, gate_terms, at, inside, CHANNELS, CHUNK)
    _put_sums(partial, gate_sums, GATE, program, programs, CHANNELS, CHUNK)
    _put_sums(partial, weight_sums, WEIGHT, program, programs, CHANNELS, CHUNK)
    _put_sums(partial, shift_sums, SHIFT, program, programs, CHANNELS, CHUNK)
    _put_sums(partial, scale_sums, SCALE, program, programs, CHANNELS, CHUNK)
