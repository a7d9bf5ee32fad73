"""Models of every host end to end, patched and not, eager and compiled: small networks of each class on a CPU, of real widths on a GPU.

Those of diffusers are its own; EDM, EDM2, the original DiT and HDiT stand in `benchmarks/hosts.py`. On a CPU the compiler takes minutes for
all of them: `--quick` compiles none there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import hosts
from benchmarks.workloads import Case, Workload
from fastdiff_kernels.integrations import dit as original_dit
from fastdiff_kernels.integrations import edm, k_diffusion
from fastdiff_kernels.integrations.diffusers import patch

GPU = torch.cuda.is_available()
TIMES = torch.tensor([700, 30])


def unet() -> nn.Module:
    channels = (128, 256, 256, 256) if GPU else (64, 128)
    down = ("DownBlock2D", "AttnDownBlock2D", *("DownBlock2D",) * (len(channels) - 2))
    up = (*("UpBlock2D",) * (len(channels) - 2), "AttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=32, block_out_channels=channels, layers_per_block=2, attention_head_dim=64, down_block_types=down, up_block_types=up
    )


def stable_diffusion() -> nn.Module:
    if GPU:
        return diffusers.UNet2DConditionModel(cross_attention_dim=768)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128),
        layers_per_block=2,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280) if GPU else (64, 128, 256),
        cross_attention_dim=2048 if GPU else 512,
        attention_head_dim=(5, 10, 20) if GPU else (1, 2, 4),
        transformer_layers_per_block=(1, 2, 10) if GPU else (1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def dit() -> nn.Module:
    heads, width, layers = (16, 72, 28) if GPU else (6, 64, 4)
    return diffusers.DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width, num_layers=layers, sample_size=32)


def pixart() -> nn.Module:
    heads, layers = (16, 28) if GPU else (6, 4)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads,
        num_layers=layers,
        sample_size=64 if GPU else 32,
        cross_attention_dim=72 * heads,
        use_additional_conditions=False,
        caption_channels=512,
    )


def sd3() -> nn.Module:
    heads, layers = (24, 24) if GPU else (6, 4)
    return diffusers.SD3Transformer2DModel(
        sample_size=128 if GPU else 32,
        in_channels=16,
        num_attention_heads=heads,
        num_layers=layers,
        caption_projection_dim=64 * heads,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        pos_embed_max_size=96,
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    heads, double, single = (24, 4, 8) if GPU else (4, 2, 4)
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=heads, num_layers=double, num_single_layers=single, joint_attention_dim=512, pooled_projection_dim=256
    )


def wan() -> nn.Module:
    heads, layers = (12, 8) if GPU else (4, 2)
    return diffusers.WanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=512 * heads, text_dim=512)


def places(size: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return torch.stack((torch.zeros(size**2), rows.flatten(), columns.flatten()), 1)


LATENT, TOKENS = (64, 4096) if GPU else (32, 256)
# Network of diffusers: how it is built, the shape of x, and the rest of its arguments.
DIFFUSERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (unet, (4, 3, 32, 32), lambda: {"timestep": TIMES.repeat(2)}),
    "SD-U-Net": (stable_diffusion, (2, 4, LATENT, LATENT), lambda: {"timestep": TIMES, "encoder_hidden_states": torch.randn(2, 77, 768)}),
    "SDXL-U-Net": (
        sdxl,
        (1, 4, 128, 128) if GPU else (1, 4, 32, 32),
        lambda: {
            "timestep": TIMES[:1],
            "encoder_hidden_states": torch.randn(1, 77, 2048 if GPU else 512),
            "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]])},
        },
    ),
    "DiT": (dit, (2, 4, 32, 32), lambda: {"timestep": TIMES, "class_labels": torch.tensor([3, 900])}),
    "PixArt": (
        pixart,
        (2, 4, LATENT, LATENT),
        lambda: {
            "timestep": TIMES,
            "encoder_hidden_states": torch.randn(2, 120, 512),
            "encoder_attention_mask": (torch.arange(120) < torch.tensor([[120], [40]])).long(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3.5": (
        sd3,
        (2, 16, 128, 128) if GPU else (2, 16, 32, 32),
        lambda: {"timestep": TIMES, "encoder_hidden_states": torch.randn(2, 77, 512), "pooled_projections": torch.randn(2, 256)},
    ),
    "Flux": (
        flux,
        (1, TOKENS, 64),
        lambda: {
            "timestep": torch.tensor([0.7]),
            "encoder_hidden_states": torch.randn(1, 128, 512),
            "pooled_projections": torch.randn(1, 256),
            "guidance": None,
            "img_ids": places(int(TOKENS**0.5)),
            "txt_ids": torch.zeros(128, 3),
        },
    ),
    "Wan": (
        wan,
        (1, 16, 21, 60, 104) if GPU else (1, 16, 4, 32, 32),
        lambda: {"timestep": TIMES[:1], "encoder_hidden_states": torch.randn(1, 128, 512)},
    ),
}


def labels() -> dict[str, Any]:
    return {"sigma": torch.tensor([0.4, 5.0]), "class_labels": torch.eye(10)[[1, 7]]}


def original() -> nn.Module:
    width, depth, heads = (1152, 28, 16) if GPU else (384, 4, 6)
    return hosts.DiT(input_size=32, hidden_size=width, depth=depth, num_heads=heads, num_classes=1000)


def hourglass() -> nn.Module:
    return hosts.HDiT(width=768 if GPU else 256, d_head=64, cond_features=256, depth=8 if GPU else 4, patch_size=4)


@dataclass(frozen=True)
class Network:
    """One network of a host, and what patches it."""

    adapter: str
    patch: Callable[[nn.Module], object]
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of x."""
    arguments: Callable[[], dict[str, Any]]
    """The rest of them."""


CHANNELS, HEADS = (256, (4, 4, 0, 4)) if GPU else (64, (1, 0, 1))
NETWORKS = {
    **{name: Network("diffusers", patch, *parts) for name, parts in DIFFUSERS.items()},
    "EDM's U-Net": Network("edm", edm.patch, lambda: hosts.edm(True, 10, CHANNELS, HEADS), (2, 2, 32, 32), labels),
    "EDM2's U-Net": Network("edm", edm.patch, lambda: hosts.edm2(10, CHANNELS, HEADS), (2, 2, 32, 32), labels),
    "original DiT": Network("dit", original_dit.patch, original, (2, 4, 32, 32), lambda: {"t": TIMES, "y": torch.tensor([3, 900])}),
    "HDiT": Network("k_diffusion", k_diffusion.patch, hourglass, (2, 3, 64, 64), lambda: {"sigma": torch.tensor([0.4, 5.0])}),
}


@cache
def network(name: str, dtype: torch.dtype, patched: bool) -> Callable[[Tensor], Tensor]:
    host = NETWORKS[name]
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    model = host.build().to(device, dtype).eval().requires_grad_(False)
    rest = moved(host.arguments(), device, dtype)
    if patched:
        host.patch(model)
    if host.adapter == "diffusers":
        return lambda x: model(x, **rest, return_dict=False)[0]
    return lambda x: model(x, **rest)


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: moved(inner, device, dtype) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    wide = value.is_floating_point() and value.dim() > 1 and value.shape[-1] > 3
    return value.to(device, dtype if wide else value.dtype)


def provider(name: str, patched: bool, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    run: dict[torch.dtype, Callable] = {}

    def call(x: Tensor) -> Tensor:
        if not compiled:
            return network(name, x.dtype, patched)(x)
        if x.dtype not in run:
            run[x.dtype] = torch.compile(network(name, x.dtype, patched), dynamic=False)
        return run[x.dtype](x)

    return call


def workload(name: str) -> Workload:
    host = NETWORKS[name]
    shape = host.shape
    return Workload(
        host.adapter, name, shape, lambda: [torch.randn(shape)], provider(name, False), provider(name, True), gradients=(0,),
        factor=8.0, compiled=False, dtypes=(torch.float32, torch.bfloat16),
    )  # fmt: skip


WORKLOADS = [workload(name) for name in NETWORKS]


def with_compiled(case: Case) -> Case:
    name = case.workload.network
    compiled = {"compile": provider(name, False, True), "ours+compile": provider(name, True, True)}
    return replace(case, workload=replace(case.workload, rivals=compiled))


def compiles(case: Case, quick: bool) -> bool:
    # Inductor's gradient of diffusers.UNet2DConditionModel is wrong on a CPU, with the patch and without (docs/integrations.md); the check
    # would end the run.
    wrong = case.workload.network in ("SD-U-Net", "SDXL-U-Net") and case.mode == "fwd+bwd"
    return GPU or not (quick or wrong)


def test_speed(case: Case, measure, request) -> None:
    measure(with_compiled(case) if compiles(case, request.config.getoption("--quick")) else case)
