"""Other libraries as columns: called as they document it, absent by name. The libraries here are stand-ins with the real signatures."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from benchmarks import bench_attention, bench_group_norm, bench_modulate, bench_rotary, rivals

EPS = 1e-6


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
    assert not in_place
    assert offset == 0
    return F.rms_norm(X, W.shape, W, eps)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert X.is_contiguous()
    assert X.shape[1] == num_channels
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def fused_layer_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input, normalized_shape, eps=eps)


def fused_rms_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input, normalized_shape, eps=eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input, normalized_shape, weight, eps)


def one_pass(x, G, weight, bias, eps, act=""):
    assert x[0, 0].numel() <= 1024
    return two_pass(x, G, weight, bias, eps, act)


def two_pass(x, G, weight, bias, eps, act=""):
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert act == ""
    return F.group_norm(x, G, weight, bias, eps)


def flashinfer_rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    assert input.dim() == 2
    return F.rms_norm(input, weight.shape, weight, eps)


def flashinfer_layernorm(input, gemma, beta, eps=1e-6):
    assert input.dim() == 2
    assert gemma.dtype == beta.dtype == torch.float32
    return F.layer_norm(input, gemma.shape, gemma, beta, eps)


def single_prefill_with_kv_cache(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, causal=False):
    assert not causal
    return rivals.sdpa(q[None], k[None], v[None])[0]


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return rivals.sdpa(query, key, value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return rivals.sdpa(q, k, v)


LIBRARIES = {
    "liger_kernel.transformers.functional": [liger_layer_norm, liger_rms_norm, liger_group_norm],
    "apex.normalization.fused_layer_norm": [fused_layer_norm, fused_rms_norm, fused_rms_norm_affine],
    "apex.contrib.group_norm.group_norm": {"cuda_group_norm_nhwc_one_pass": one_pass, "cuda_group_norm_nhwc_two_pass": two_pass},
    "flashinfer.norm": {"rmsnorm": flashinfer_rmsnorm, "layernorm": flashinfer_layernorm},
    "flashinfer.prefill": [single_prefill_with_kv_cache],
    "xformers.ops": [memory_efficient_attention],
    "flash_attn": [flash_attn_func],
}


@pytest.fixture
def libraries(monkeypatch):
    """All of them can be imported."""
    for name, functions in LIBRARIES.items():
        parents = name.split(".")
        for i in range(1, len(parents) + 1):
            place = ".".join(parents[:i])
            if place not in sys.modules:
                module = ModuleType(place)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, place, module)
        named = functions if isinstance(functions, dict) else {f.__name__: f for f in functions}
        for function_name, function in named.items():
            monkeypatch.setattr(sys.modules[name], function_name, function, raising=False)
    rivals._module.cache_clear()
    yield
    rivals._module.cache_clear()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("layer_norm", {"liger", "apex", "flashinfer"}),
        ("rms_norm", {"liger", "apex", "flashinfer"}),
        ("group_norm", {"liger", "apex"}),
        ("attention", {"flashinfer", "xformers", "flash-attn"}),
    ],
)
def test_every_library_computes_its_part(kind, names):
    x = torch.randn(1, 6, 4, 8)
    weight, bias = torch.randn(6), torch.randn(6)
    inputs = {"group_norm": (x, 3, weight, bias, EPS), "attention": (x, x.sin(), x.cos())}.get(kind, (x, EPS))
    standard = {
        "layer_norm": lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps),
        "rms_norm": lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps),
        "group_norm": F.group_norm,
        "attention": lambda q, k, v: rivals.sdpa(q, k, v),
    }[kind]
    fields = rivals.of(kind, lambda part: part, gpu=True)
    found = {**fields["rivals"], **fields["forward_rivals"]}
    assert found.keys() == names
    for run in found.values():
        torch.testing.assert_close(run(*inputs), standard(*inputs))
    if kind == "rms_norm":
        scale = torch.randn(8)
        for run in found.values():
            torch.testing.assert_close(run(x, EPS, scale), F.rms_norm(x, (8,), scale, EPS))


@pytest.mark.usefixtures("libraries")
def test_large_maps_take_the_two_passes_of_apex():
    weight, bias = torch.randn(2, 4)
    run = rivals.of("group_norm", lambda part: part, gpu=True)["rivals"]["apex"]
    for side in (32, 33):
        x = torch.randn(2, 4, side, side)
        torch.testing.assert_close(run(x, 2, weight, bias, EPS), F.group_norm(x, 2, weight, bias, EPS))


@pytest.mark.usefixtures("libraries")
def test_one_request_kernels_refuse_batches():
    run = rivals.of("attention", lambda part: part, gpu=True)["forward_rivals"]["flashinfer"]
    with pytest.raises(RuntimeError, match="takes one sample; got 2"):
        run(*torch.randn(3, 2, 6, 4, 8))


@pytest.mark.usefixtures("libraries")
def test_libraries_without_gradients_are_no_rivals_of_a_backward_pass():
    assert set(rivals.of("layer_norm", lambda part: part, gpu=True)["forward_rivals"]) == {"flashinfer"}


@pytest.mark.usefixtures("libraries")
def test_on_a_gpu_attention_has_a_column_for_each_backend_of_pytorch():
    fields = rivals.attention(lambda packed: packed.unbind(2), gpu=True)
    packed = torch.randn(1, 6, 3, 4, 8)
    assert {"sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "xformers", "flash-attn"} == fields["rivals"].keys()
    torch.testing.assert_close(fields["rivals"]["flash-attn"](packed), fields["rivals"]["sdpa"](packed))
    with pytest.raises(RuntimeError, match=r"backend|kernel"):
        fields["rivals"]["sdpa-cudnn"](packed)


@pytest.mark.usefixtures("libraries")
def test_compositions_around_a_library_are_what_eager_computes(monkeypatch):
    """Each workload's way of putting a library's part to use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    norm = rivals.of("layer_norm", lambda part: part, gpu=True)["rivals"]["liger"]
    x, branch, shift, scale, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8), *torch.randn(3, 2, 8)
    torch.testing.assert_close(bench_modulate.modulated(norm)(x, shift, scale), bench_modulate.layer_norm_modulate(x, shift, scale))
    torch.testing.assert_close(
        bench_modulate.gated(norm)(x, branch, gate, shift, scale),
        bench_modulate.gate_residual_norm_modulate(x, branch, gate, shift, scale),
    )
    rms = rivals.of("rms_norm", lambda part: part, gpu=True)["rivals"]["liger"]
    packed, weights = torch.randn(2, 5, 3, 4, 8), torch.randn(2, 8)
    angles = torch.randn(2, 5, 4)
    for rope in (None, "half", "interleaved"):
        given = (packed, *weights, *(angles if rope else ()))
        torch.testing.assert_close(bench_rotary.composed(rope, rms)(*given), bench_rotary.composed(rope, bench_rotary.rms)(*given))
    for modulated in (True, False):
        w = bench_group_norm.workload("EDM", True, modulated)
        inputs = w.inputs()
        assert {"liger", "apex"} == w.rivals.keys()
        for run in w.rivals.values():
            torch.testing.assert_close(run(*inputs), w.eager(*inputs))


def test_what_cannot_be_imported_is_absent_with_the_reason(monkeypatch):
    rivals._module.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert "xformers" in rivals.absent()["xformers"]
    assert "xformers" not in rivals.of("attention", lambda part: part, gpu=True)["rivals"]
    rivals._module.cache_clear()


def test_without_a_gpu_libraries_are_no_rivals():
    assert rivals.of("layer_norm", lambda part: part, gpu=False) == {"rivals": {}, "forward_rivals": {}}
    assert set(rivals.attention(lambda packed: packed.unbind(2), gpu=False)["rivals"]) == {"sdpa"}
    assert set(bench_attention.WORKLOADS[0].rivals) >= {"sdpa"}
