"""The launches that tests/check_spills.py compiles: for every family, the calls that lead to differently compiled kernels.

Tensors have no data (device "meta"), so that sizes may be anything.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton

from fastdiff_kernels.triton import (
    attention,
    distillation,
    group_norm,
    modulate,
    rotary,
    sampling,
    schedule,
    score_matching,
    skipping,
)
from fastdiff_kernels.triton._scale import scale_samples_
from tests import shapes

Cases = Iterator[tuple[str, Callable[[], object]]]

SIXTEEN = (torch.bfloat16, torch.float16)
NARROW = (*SIXTEEN, torch.float32)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shifted(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that begins one element after a multiple of 16 bytes."""
    whole = torch.empty(shape, device="meta").numel()
    return torch.empty(whole + 1, dtype=dtype, device="meta")[1:].view(shape)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Each padding class of a head's width: the width that fills it, and one that does not. Rows that do not begin and end at multiples of 16
# bytes are copied before they reach a kernel.
HEAD_WIDTHS = {16: 8, 32: 24, 48: 40, 64: 56, 80: 72, 96: 88, 128: 120, 160: 152, 192: 184, 256: 200}


def _attention(
    width, dtype, queries=1000, keys=1000, heads=2, batch=2, lengths=True, of_lse=True, scale=0.1, kinds=("forward", "backward", "dual"),
    needs=(True, True, True), tangents=(True, True, True),
):  # fmt: skip
    def call():
        q, k, v = (empty(batch, n, heads, width, dtype=dtype) for n in (queries, keys, keys))
        lse = empty(batch, heads, queries)
        key_lengths = empty(batch, dtype=torch.int64) if lengths else None
        if "forward" in kinds:
            attention.attention(q, k, v, scale, key_lengths)
        if "backward" in kinds:
            attention.attention_backward(q, lse if of_lse else None, q, k, v, scale, key_lengths, q, lse, needs)
        if "dual" in kinds and (dtype != torch.float32 or width <= 128):
            moved = [x if wanted else None for x, wanted in zip((q, k, v), tangents, strict=True)]
            attention.attention_dual(q, k, v, scale, key_lengths, *moved)

    return call


def attention_cases() -> Cases:
    """Products: padding class x dtype x {filled, not filled} with key lengths, a ragged last block, and every output, gradient and tangent
    wanted, and in rows long enough for blocks of their own; class x {bfloat16, float32} in whole blocks. One at a time, for each class in
    bfloat16: no lengths, a negative scale, one gradient or tangent alone, none. In one class: one head, one query, 2^31 elements."""
    for width, dtype in itertools.product(HEAD_WIDTHS, NARROW):
        yield f"{width} {short(dtype)}", _attention(width, dtype)
    for width, dtype in itertools.product(HEAD_WIDTHS, NARROW):
        yield f"{width} {short(dtype)}, long", _attention(width, dtype, 2000, 2000, lengths=False, kinds=("forward",))
        yield f"{HEAD_WIDTHS[width]} {short(dtype)}", _attention(HEAD_WIDTHS[width], dtype)
    for width, dtype in itertools.product(HEAD_WIDTHS, (torch.bfloat16, torch.float32)):
        yield f"{width} {short(dtype)}, whole blocks", _attention(width, dtype, 512, 512, lengths=False, of_lse=False)
        yield f"{width} {short(dtype)}, long, whole blocks", _attention(width, dtype, 2048, 2048, lengths=False, kinds=("forward",))
    for width in HEAD_WIDTHS:

        def alone(name, width=width, **options):
            return f"{width}, {name}", _attention(width, torch.bfloat16, **options)

        yield alone("no lengths", lengths=False, of_lse=False)
        yield alone("negative scale", scale=-0.1, kinds=("forward", "dual"))
        for i, name in enumerate("qkv"):
            only = tuple(i == j for j in range(3))
            yield alone(f"{name}'s gradient and tangent alone", needs=only, tangents=only, kinds=("backward", "dual"))
        yield alone("no gradients and tangents", needs=(False,) * 3, tangents=(False,) * 3, kinds=("backward", "dual"))
    yield "72, one head", _attention(72, torch.bfloat16, heads=1)
    yield "72, one query", _attention(72, torch.bfloat16, queries=1)
    yield "72, 2^31 elements", _attention(72, torch.bfloat16, queries=2**20, keys=2**20, heads=4, batch=8)


# Channels: widths of networks, of which most fill their tile, and each kind of tile above 2048; and small and odd ones.
NETWORK_CHANNELS = (8192, 7168, 4096, 2560, 2048, *shapes.CHANNELS.values())
OTHER_CHANNELS = (8100, 6100, 5000, 3001, 2500, 1000, 160, 40, 8, 5)
MODULATIONS = {"C": (2,), "BC": (0, 2), "BNC": (0, 1, 2)}


def _modulate(
    channels, dtype, op="gate_residual_norm_modulate", kind="BC", table=True, norm="layer", gate=True, weight=True, shift=True, scale=True,
    tokens=1000, batch=2, needs=None, hidden=True, modulated=True, beside=torch.float32, make=empty, turned=False,
):  # fmt: skip
    """Forward and backward of a call, its modulation in views of one projection, of dtype `beside` where x has 16 bits."""
    beside = dtype if dtype.itemsize > 2 else beside

    def activation():
        return make(batch, channels, tokens, dtype=dtype).mT if turned else make(batch, tokens, channels, dtype=dtype)

    def call():
        shape = [(batch, tokens, 6 * channels)[i] for i in MODULATIONS[kind]]
        parts = make(*shape, dtype=beside).chunk(6, dim=-1)
        of_table = (
            make(6, channels, dtype=beside)[1 : 1 + (op != "gate_residual") * 2 + (gate and op.startswith("gate"))] if table else None
        )
        x, branch = activation(), activation()
        norm_of = (parts[0] if shift else None, parts[1] if scale else None)
        if op == "layer_norm_modulate":
            args = [x, *norm_of, of_table, 1e-6]
        elif op == "rms_norm_modulate":
            args = [x, make(channels, dtype=beside) if weight else None, *norm_of, of_table, 1e-6]
        elif op == "gate_residual":
            args = [x, branch, parts[2], of_table]
        else:
            args = [x, branch, parts[2] if gate else None, *norm_of, of_table, norm, 1e-6]
        differentiable = [a for a in args if a is None or isinstance(a, torch.Tensor)]
        wanted = [a is not None and (needs is None or i in needs) for i, a in enumerate(differentiable)]
        getattr(modulate, op)(*args)
        grads = (
            [activation() if hidden else None, activation() if modulated else None]
            if op.endswith("norm_modulate") and branch is args[1]
            else [activation()]
        )
        getattr(modulate, f"{op}_backward")(*grads, *args, wanted)

    return call


def modulate_cases() -> Cases:
    """Products: every width x {bfloat16, float32} x {gate + residual + LayerNorm with a table, RMS norm with weight and table}, both with
    modulation [B, C] in float32. For eight of the widths: the same in float16 and float64 and in pairs of 16 bits, and with modulation
    [B, N, C]. For four, in bfloat16 and float32, one at a time: every other op, operand, gradient and layout."""
    ops = (("gate_residual_norm_modulate", {}), ("rms_norm_modulate", {}))
    for channels, dtype, (op, options) in itertools.product(NETWORK_CHANNELS + OTHER_CHANNELS, (torch.bfloat16, torch.float32), ops):
        yield f"{op} {channels} {short(dtype)}", _modulate(channels, dtype, op, **options)
    for channels, (op, options) in itertools.product((8192, 6144, 4096, 3072, 1152, 1024, 256, 128), ops):
        for dtype in (torch.float16, *(torch.float64,) * (channels <= 3072)):
            yield f"{op} {channels} {short(dtype)}", _modulate(channels, dtype, op, **options)
        yield f"{op} {channels} bfloat16 throughout", _modulate(channels, torch.bfloat16, op, beside=torch.bfloat16, **options)
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{op} {channels} {short(dtype)} by row", _modulate(channels, dtype, op, kind="BNC", **options)
    variations = {
        "layer_norm_modulate": {"op": "layer_norm_modulate"},
        "gate_residual": {"op": "gate_residual"},
        "RMS norm": {"norm": "rms"},
        "no table": {"table": False},
        "no gate": {"gate": False},
        "no gate, no table": {"gate": False, "table": False},
        "of all samples": {"kind": "C"},
        "no table, by row": {"table": False, "kind": "BNC"},
        "RMS norm alone": {"op": "rms_norm_modulate", "weight": False, "shift": False, "scale": False, "table": False},
        "RMS norm and weight alone": {"op": "rms_norm_modulate", "shift": False, "scale": False, "table": False},
        "RMS norm, no weight": {"op": "rms_norm_modulate", "weight": False},
        "RMS norm, scale alone": {"op": "rms_norm_modulate", "shift": False, "table": False},
        "hidden's gradient alone": {"modulated": False},
        "modulated's gradient alone": {"hidden": False},
        "gradients of activations alone": {"needs": (0, 1)},
        "gradients of modulation alone": {"needs": (2, 3, 4, 5)},
        "gradient of x alone": {"op": "layer_norm_modulate", "table": False, "needs": (0,)},
        "few tokens": {"tokens": 4},
        "one token": {"tokens": 1},
        "many tokens": {"tokens": 4096},
        "one sample": {"batch": 1},
        "channels outermost": {"turned": True},
        "2^31 rows": {"batch": 2**12, "tokens": 2**20},
        "not aligned": {"make": shifted},
    }
    for (name, options), channels, dtype in itertools.product(
        variations.items(), (8192, 4096, 3072, 1152), (torch.bfloat16, torch.float32)
    ):
        yield f"{channels} {short(dtype)}, {name}", _modulate(channels, dtype, **options)


def _group_norm(
    shape, groups, dtype, beside=torch.float32, channels_last=False, affine=True, modulated=True, activation="silu", needs=(True,) * 5,
    make=empty,
):  # fmt: skip
    beside = dtype if dtype.itemsize > 2 else beside

    def call():
        batch, channels = shape[:2]
        x = make(*shape, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        parameters = [make(channels, dtype=beside) if affine else None for _ in range(2)]
        modulation = make(batch, 2 * channels, dtype=beside).chunk(2, dim=1) if modulated else (None, None)
        given = (*parameters, *modulation)
        wanted = [n and (i == 0 or given[i - 1] is not None) for i, n in enumerate(needs)]
        _, mean, inverse = group_norm.group_norm_silu(x, groups, *given, 1e-5, activation)
        group_norm.group_norm_silu_backward(x, x, groups, *given, 1e-5, activation, mean, inverse, wanted)

    return call


# Channels, groups and pixels along a side: of networks; then few pixels, and so many channels or groups in a tile; groups of all channels,
# of one, and of numbers that are no power of two; a side of odd length.
NETWORK_GROUPS = ((256, 32, 16), (320, 32, 64), (1920, 32, 16), (384, 32, 32), (640, 32, 32), (1280, 32, 16), (2560, 32, 8))
OTHER_GROUPS = (
    (256, 32, 1), (2560, 32, 1), (2560, 32, 2), (64, 64, 1), (256, 256, 8), (256, 256, 64), (4096, 1, 1), (8192, 1, 4), (320, 1, 8),
    (1024, 1, 32), (4096, 4, 64), (24, 8, 5), (30, 5, 31), (960, 32, 33), (192, 6, 512), (512, 512, 1),
)  # fmt: skip


def group_norm_cases() -> Cases:
    """Products: shapes of networks and others x {planes, channels last} x {bfloat16, float32} with every operand and gradient. For three
    shapes also float16, float64 and parameters in x's 16 bits. For two, in bfloat16 and float32, one at a time: every operand and gradient
    left out, no activation, tensors that are not aligned. For one, 2^31 elements."""
    of_networks = ((channels, groups, 32) for channels, groups in shapes.MAPS.values())
    for (channels, groups, side), last, dtype in itertools.product(
        (*OTHER_GROUPS, *NETWORK_GROUPS, *of_networks), (False, True), (torch.bfloat16, torch.float32)
    ):
        name = f"{channels} in {groups}, {side} x {side}, {'rows' if last else 'planes'}, {short(dtype)}"
        yield name, _group_norm((2, channels, side, side), groups, dtype, channels_last=last)
    variations = {
        "no parameters": {"affine": False},
        "no modulation": {"modulated": False},
        "neither": {"affine": False, "modulated": False},
        "no activation": {"activation": None},
        "gradient of x alone": {"needs": (True, False, False, False, False)},
        "gradients of parameters alone": {"needs": (False, True, True, False, False)},
        "gradients of modulation alone": {"needs": (False, False, False, True, True)},
        "not aligned": {"make": shifted},
    }
    for (channels, groups, side), last in itertools.product(NETWORK_GROUPS[:3], (False, True)):
        name, shape = f"{channels} in {groups}, {side} x {side}, {'rows' if last else 'planes'}", (2, channels, side, side)
        for dtype in (torch.float16, torch.float64):
            yield f"{name}, {short(dtype)}", _group_norm(shape, groups, dtype, channels_last=last)
        yield f"{name}, bfloat16 throughout", _group_norm(shape, groups, torch.bfloat16, torch.bfloat16, channels_last=last)
    for (channels, groups, side), last, dtype in itertools.product(NETWORK_GROUPS[:2], (False, True), (torch.bfloat16, torch.float32)):
        name, shape = f"{channels} in {groups}, {side} x {side}, {'rows' if last else 'planes'}", (2, channels, side, side)
        for variation, options in variations.items():
            yield f"{name}, {short(dtype)}, {variation}", _group_norm(shape, groups, dtype, channels_last=last, **options)
    for last in (False, True):
        yield f"2^31 elements, {last}", _group_norm((2, 128, 4096, 4096), 32, torch.bfloat16, channels_last=last)


def _rotary(
    heads, width, dtype, norm, rope, tokens="inside", beside=torch.float32, weights=True, batched=False, rows=1000, keys=None, batch=2,
    needs=(True,) * 4, make=empty,
):  # fmt: skip
    """Forward and backward of q and k (and v for a pixel norm without angles) of one projection, whose tokens are inside or innermost."""
    beside = dtype if dtype.itemsize > 2 else beside

    def projection(rows):
        if tokens == "inside":
            return make(batch, rows, 3, heads, width, dtype=dtype).unbind(2)
        return [x.permute(0, 3, 1, 2) for x in make(batch, heads, width, 3, rows, dtype=dtype).unbind(3)]

    def call():
        q, k, v = projection(rows)
        if keys is not None:
            k = projection(keys)[1]
        upstream = [empty(*x.shape, dtype=dtype) for x in (q, k, v)]
        if norm == "pixel" and rope is None and weights:
            rotary.qkv_pixel_norm(q, k, v, 1e-4)
            rotary.qkv_pixel_norm_backward(*upstream, q, k, v, 1e-4, needs[:3])
            rotary.pixel_norm(q, 1e-4)
            rotary.pixel_norm_backward(upstream[0], q, 1e-4, needs[:1])
            return
        size = heads * width if norm and norm.endswith("_heads") else width
        weighted = weights and norm not in (None, "pixel")
        scales = [make(size, dtype=beside) if weighted else None for _ in range(2)]
        angles = [None if rope is None else make(*(batch,) * batched, rows, width // 2, dtype=beside) for _ in range(2)]
        wanted = [need and (i < 2 or weighted) for i, need in enumerate(needs)]
        rotary.qk_norm_rope(q, k, *scales, *angles, norm, rope or "half", 1e-6)
        rotary.qk_norm_rope_backward(*upstream[:2], q, k, *scales, *angles, norm, rope or "half", 1e-6, [*wanted, False, False])

    return call


# Heads and widths: of networks, and the narrowest, widest and oddest.
HEADS = ((16, 72), (24, 128), (1, 256), (8, 40), (8, 160), (12, 64), (3, 22), (2, 512))
# Whole tokens are normalised: their channels count, up to 8192.
TOKENS = ((40, 128), (64, 128), (32, 256), (128, 64), (12, 128), (24, 128), (16, 72), (1024, 8), (8, 22))


def rotary_cases() -> Cases:
    """Products: shapes x {bfloat16, float32} x norms and angles, and shapes whose whole tokens are normalised x the same dtypes x norms and
    angles, with weights and all gradients. The heads of every network x the same dtypes with one norm. Projections with tokens innermost:
    shapes x dtypes x {RMS norm interleaved, pixel norm}. In float16, float64 and 16-bit pairs one norm of each kind. One at a time at a
    width of 72 and for whole tokens of 40 heads of 128: operands, gradients and sizes."""
    narrow_and_wide = (torch.bfloat16, torch.float32)
    kinds = (("rms", "interleaved"), ("layer", "half"), ("rms", None), (None, "half"), ("pixel", None))
    of_tokens = (("rms_heads", "interleaved"), ("layer_heads", "half"), ("rms_heads", None))
    for sizes, pairs in ((TOKENS, of_tokens), (HEADS, kinds)):
        for (heads, width), (norm, rope), dtype in itertools.product(sizes, pairs, narrow_and_wide):
            yield f"{heads} x {width}, {norm}, {rope}, {short(dtype)}", _rotary(heads, width, dtype, norm, rope)
    for (network, (heads, width)), dtype in itertools.product(shapes.HEADS.items(), narrow_and_wide):
        norm, rope = ("pixel", None) if network.startswith("EDM2") else ("rms", "interleaved")
        yield f"{heads} x {width}, {norm}, {rope}, {short(dtype)}", _rotary(heads, width, dtype, norm, rope)
    for (heads, width), (norm, rope), dtype in itertools.product(HEADS, (("rms", "interleaved"), ("pixel", None)), narrow_and_wide):
        name = f"{heads} x {width}, {norm}, {rope}, {short(dtype)}, tokens innermost"
        yield name, _rotary(heads, width, dtype, norm, rope, tokens="innermost")
    common = [*((h, w, "rms", "interleaved") for h, w in HEADS), *((h, w, "layer_heads", "half") for h, w in TOKENS)]
    for heads, width, norm, rope in common:
        name = f"{heads} x {width}, {norm}, {rope}"
        fits = norm == "rms" or triton.next_power_of_2(heads) * triton.next_power_of_2(width) <= 4096
        for dtype in (torch.float16, *(torch.float64,) * fits):
            yield f"{name}, {short(dtype)}", _rotary(heads, width, dtype, norm, rope)
        yield f"{name}, bfloat16 throughout", _rotary(heads, width, torch.bfloat16, norm, rope, beside=torch.bfloat16)
    variations = {
        "no weights": {"weights": False},
        "angles of each sample": {"batched": True},
        "gradients of q and k alone": {"needs": (True, True, False, False)},
        "gradients of weights alone": {"needs": (False, False, True, True)},
        "one token": {"rows": 1},
        "few tokens": {"rows": 3},
        "whole blocks": {"rows": 1024},
        "one sample": {"batch": 1},
        "2^31 elements": {"batch": 2**8, "rows": 2**16},
        "not aligned": {"make": shifted},
    }
    for (variation, options), (heads, width, norm), dtype in itertools.product(
        variations.items(), ((16, 72, "rms"), (40, 128, "rms_heads")), narrow_and_wide
    ):
        name = f"{heads} x {width}, {norm}, {short(dtype)}, {variation}"
        yield name, _rotary(heads, width, dtype, norm, "interleaved", **options)
        if norm == "rms":
            yield f"{name}, tokens innermost", _rotary(heads, width, dtype, norm, "half", tokens="innermost", **options)


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _sizes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """How batches of samples come: of many chunks and of one, of sizes that 16 divides and does not, not aligned."""
    for name, make, shape in (("long", empty, (2, 2**16)), ("short", empty, (4, 250)), ("shifted", shifted, (2, 2**16))):
        yield f"{short(dtype)}, {name}", functools.partial(make, *shape, dtype=dtype)


def _some(count: int, name: str) -> Iterator[tuple[bool, ...]]:
    """All of so many gradients; of long samples in bfloat16 and float32 also each alone."""
    yield (True,) * count
    if count > 1 and name in ("bfloat16, long", "float32, long"):
        yield from (tuple(i == j for j in range(count)) for i in range(count))


def distillation_cases() -> Cases:
    """Products: every op x dtype x size x {raw outputs, denoised} x distance, and all gradients; for two of them each alone."""
    for dtype in FLOATS:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        one, double = empty(1, dtype=wide), empty(1, dtype=torch.float64)
        for name, make in _sizes(dtype):
            x = make()
            for raw, distance in itertools.product((False, True), ("pseudo_huber", "squared_l2")):
                given = (x, x, x, *((x, one, one) if raw else (None,) * 3), one, one, distance)
                yield f"sim_loss, {name}, {raw}, {distance}", functools.partial(distillation.sim_loss, *given)
                for needs in _some(3 + raw, name):
                    call = functools.partial(distillation.sim_loss_backward, one, *given, double, double, (*needs, *[False] * (not raw)))
                    yield f"sim_loss_backward, {name}, {raw}, {distance}, {needs}", call
            for op in ("moment_matching_loss", "moment_matching_auxiliary_loss"):
                yield f"{op}, {name}", functools.partial(getattr(distillation, op), x, x, x, one)
                yield f"{op}_recorded, {name}", functools.partial(getattr(distillation, f"{op}_recorded"), x, x, x, one, [True])
                yield f"{op}_backward, {name}", functools.partial(getattr(distillation, f"{op}_backward"), one, x, x, x, one, [True])


def sampling_cases() -> Cases:
    """Products: every op x dtype x size, with guidance and without, and all gradients; for two of them each alone."""
    seed = empty(dtype=torch.int64)
    for dtype in FLOATS:
        one = empty(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for name, make in _sizes(dtype):
            x = make()
            given = (x, x, one, one, seed, 3)
            yield f"posterior_sample, {name}", functools.partial(sampling.posterior_sample, *given)
            for needs in _some(2, name):
                yield f"posterior_sample_backward, {name}, {needs}", functools.partial(sampling.posterior_sample_backward, x, *given, needs)
            for uncond in (x, None):
                step = (x, x, one, one, uncond, one)
                yield f"guided_step, {name}, {uncond is None}", functools.partial(sampling.guided_step, *step)
                for needs, grads in itertools.product(_some(2 + (uncond is not None), name), ((x, one), (x, None), (None, one))):
                    wanted = (*needs, *[False] * (uncond is None))
                    call = functools.partial(sampling.guided_step_backward, *grads, *step, wanted)
                    yield f"guided_step_backward, {name}, {wanted}, {[g is None for g in grads]}", call


def score_matching_cases() -> Cases:
    """Products: every op x dtype x size, of a pair and not, and all gradients; for two of them each alone."""
    seed = empty(dtype=torch.int64)
    for dtype in FLOATS:
        one = empty(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        three = (one,) * 3
        for name, make in _sizes(dtype):
            x = make()
            yield f"lcss_noise, {name}", functools.partial(score_matching.lcss_noise, x, seed, 3)
            yield f"lcss_perturb, {name}", functools.partial(score_matching.lcss_perturb, x, one, seed, 3)
            yield f"scale_samples, {name}", functools.partial(scale_samples_, x, one.expand(x.shape[0]))
            yield f"denoising_loss, {name}", functools.partial(score_matching.denoising_loss, x, x, one)
            for needs in _some(2, name):
                yield (
                    f"denoising_loss_recorded, {name}, {needs}",
                    functools.partial(score_matching.denoising_loss_recorded, x, x, one, needs),
                )
                call = functools.partial(score_matching.denoising_loss_backward, one, x, x, one, needs)
                yield f"denoising_loss_backward, {name}, {needs}", call
            for mirrored in (x, None):
                stored, seeded = (x, x, mirrored, *three), (x, seed, mirrored, *three, 3)
                pair = mirrored is not None
                yield f"lcss_loss, {name}, {pair}", functools.partial(score_matching.lcss_loss, *stored)
                yield f"lcss_loss_seeded, {name}, {pair}", functools.partial(score_matching.lcss_loss_seeded, *seeded)
                for op, args, count in (("lcss_loss", stored, 2), ("lcss_loss_seeded", seeded, 1)):
                    for needs in _some(count + pair, name):
                        wanted = (*needs, *[False] * (not pair))
                        call = functools.partial(getattr(score_matching, f"{op}_recorded"), *args, wanted)
                        yield f"{op}_recorded, {name}, {wanted}", call
                        call = functools.partial(getattr(score_matching, f"{op}_backward"), one, *args, wanted)
                        yield f"{op}_backward, {name}, {wanted}", call


def skipping_cases() -> Cases:
    """Products: the criteria x dtype x size; steps with every set of operands that goes together x dtype, some of them x size."""
    for dtype in FLOATS:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, make in _sizes(dtype):
            x = make()
            yield f"third_order_skip, {name}", functools.partial(skipping.third_order_skip, x, x, x, empty(1, dtype=wide))
            yield f"third_order_difference, {name}", functools.partial(skipping.third_order_difference, x, x, x, x)
            if dtype == torch.float64:
                continue
            state, rows = empty(x.shape[0], 9, dtype=torch.float64), empty(x.shape[0], dtype=torch.int64)
            for kind in itertools.product((None, x), (None, rows), (None, x), (None, x), (None, x), ("none", "official", "tensor")):
                uncond, chosen, held, previous, point, mode = kind
                if (previous is not None and point is not None) or (chosen is None) != (held is None):
                    continue
                if mode != "none" and not name.endswith("long"):
                    continue
                before = (x, x) if mode == "tensor" else (None, None)
                call = functools.partial(
                    skipping.solver_step, x, x, uncond, chosen, held, held, previous, point, *before, None if mode == "none" else state,
                    1.5, 1.0, 2.0, 1.5, 1.2, 0.4, 1.0, 1.1, 1.2, 1.3, mode, 0.1, 4, mode != "none", False,
                )  # fmt: skip
                yield f"solver_step, {name}, {[k is not None for k in kind[:-1]]}, {mode}", call
            reuse = functools.partial(
                skipping.solver_step, x, None, None, None, x, x, x, None, x, x, state[:1],
                1.5, 1.0, 2.0, 1.5, 1.2, 0.4, 1.0, 1.1, 1.2, 1.3, "tensor", 0.1, 4, False, True,
            )  # fmt: skip
            yield f"solver_step, {name}, reuse", reuse


def schedule_cases() -> Cases:
    """Products: costs x dtype x size x levels of each sample or all; schedules x dtypes x interpolation x one interval or many."""
    for dtype in FLOATS:
        for (name, make), levels in itertools.product(_sizes(dtype), (1, None)):
            x = make()
            sigma = empty(levels or x.shape[0], dtype=torch.float64)
            yield f"incremental_cost, {name}, {levels}", functools.partial(schedule.incremental_cost, x, x, x, sigma, sigma, 0.5)
    for dtypes, intervals, interpolation in itertools.product(
        itertools.product((torch.float32, torch.float64), repeat=2), (1, 17, 256), ("pchip", "linear")
    ):
        sigmas, costs = empty(2, intervals + 1, dtype=dtypes[0]), empty(2, intervals, dtype=dtypes[1])
        name = f"integrate_schedule, {intervals}, {interpolation}, {[short(d) for d in dtypes]}"
        yield name, functools.partial(schedule.integrate_schedule, sigmas, costs, 18, interpolation)


FAMILIES: dict[str, Callable[[], Cases]] = {
    "attention": attention_cases,
    "modulate": modulate_cases,
    "group_norm": group_norm_cases,
    "rotary": rotary_cases,
    "distillation": distillation_cases,
    "sampling": sampling_cases,
    "score_matching": score_matching_cases,
    "skipping": skipping_cases,
    "schedule": schedule_cases,
}
