"""Small models of every host class, randomly initialised from a config, with inputs to call them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model's name, how it is built, keyword arguments of its forward, and how many modules of each class a patch replaces."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    counts: dict[str, int]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, with parameters that no zero initialisation keeps silent."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model.to(dtype).eval()

    def call(self, model: nn.Module, dtype: torch.dtype = torch.float32, inputs: dict[str, Any] | None = None) -> Tensor:
        given = self.inputs() if inputs is None else inputs
        given = {key: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 else v for key, v in given.items()}
        return model(**given, return_dict=False)[0]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([700, 30])


def unet_2d(**options: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )


def unet_condition(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **options,
        }
    )


def sdxl() -> nn.Module:
    return unet_condition(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 10,
    )


def dit(**options: Any) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 18, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000, **options}
    )


def pixart(**options: Any) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 18,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 36,
            "caption_channels": 20,
            "use_additional_conditions": False,
            **options,
        }
    )


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            **options,
        }
    )


def flux(**options: Any) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (4, 6, 6),
            **options,
        }
    )


def wan(**options: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            **options,
        }
    )


def vae() -> nn.Module:
    """As many latents as pixels."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, shift_factor=0.0).eval()


def dit_pipeline(scheduler: Any = None) -> diffusers.DiTPipeline:
    """A class-conditional pipeline with guidance that has no callbacks."""
    decoder, model = vae(), dit(in_channels=4, out_channels=8).eval()
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.1)
    pipeline = diffusers.DiTPipeline(model, decoder, scheduler or diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_pipeline(name: str, scheduler: Any, **options: Any) -> Any:
    """A pipeline that is prompted with embeddings: "sd", "sd3", "flux" or "pixart"."""
    decoder = vae()
    if name == "sd":
        unet = unet_condition(**options).eval()
        pipeline = diffusers.StableDiffusionPipeline(decoder, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    elif name == "sd3":
        pipeline = diffusers.StableDiffusion3Pipeline(sd3(**options).eval(), scheduler, decoder, None, None, None, None, None, None)
    elif name == "flux":
        pipeline = diffusers.FluxPipeline(scheduler, decoder, None, None, None, None, flux(in_channels=16, **options).eval())
    else:
        model = pixart(out_channels=8, **options).eval()
        torch.nn.init.normal_(model.proj_out.weight, std=0.1)
        pipeline = diffusers.PixArtAlphaPipeline(None, None, decoder, model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_inputs() -> dict[str, Any]:
    return {"sample": randn(2, 3, 8, 8), "timestep": TIMES}


def text_inputs() -> dict[str, Any]:
    return {"sample": randn(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": randn(2, 7, 12, seed=2)}


def sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": randn(2, 10, seed=3), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)}
    return {**text_inputs(), "added_cond_kwargs": added}


def dit_inputs() -> dict[str, Any]:
    return {"hidden_states": randn(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([3, 999])}


def pixart_inputs() -> dict[str, Any]:
    mask = (torch.arange(6) < torch.tensor([[6], [3]])).to(torch.int64)
    return {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": randn(2, 6, 20, seed=2),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": randn(2, 5, 20, seed=2),
        "pooled_projections": randn(2, 10, seed=3),
    }


def flux_inputs() -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(3.0), indexing="ij")
    places = torch.stack((torch.zeros(12), rows.flatten(), columns.flatten()), 1)
    return {
        "hidden_states": randn(2, 12, 4),
        "timestep": torch.tensor([0.7, 0.03]),
        "encoder_hidden_states": randn(2, 5, 20, seed=2),
        "pooled_projections": randn(2, 10, seed=3),
        "guidance": None,
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }


def wan_inputs() -> dict[str, Any]:
    return {"hidden_states": randn(2, 4, 2, 4, 6), "timestep": TIMES, "encoder_hidden_states": randn(2, 5, 16, seed=2)}


UNET = {"GroupNorm": 21, "SiLU": 9}

CASES = [
    Case("UNet2DModel", unet_2d, image_inputs, {**UNET, "AttnProcessor2_0": 4}),
    Case(
        "UNet2DModel-scale-shift",
        lambda: unet_2d(resnet_time_scale_shift="scale_shift"),
        image_inputs,
        {"GroupNorm": 20, "SiLU": 9, "AttnProcessor2_0": 4},
    ),
    Case("UNet2DConditionModel-SD", unet_condition, text_inputs, {**UNET, "AttnProcessor2_0": 8}),
    Case("UNet2DConditionModel-SDXL", sdxl, sdxl_inputs, {**UNET, "AttnProcessor2_0": 16}),
    Case("DiTTransformer2DModel", dit, dit_inputs, {"AdaLayerNormZero": 2, "AttnProcessor2_0": 2, "LayerNorm": 2, "FeedForward": 2}),
    Case("PixArtTransformer2DModel", pixart, pixart_inputs, {"AttnProcessor2_0": 4, "LayerNorm": 4, "FeedForward": 2}),
    Case(
        "SD3Transformer2DModel",
        sd3,
        sd3_inputs,
        {"AdaLayerNormZero": 3, "AdaLayerNormContinuous": 2, "JointAttnProcessor2_0": 2, "LayerNorm": 3, "FeedForward": 3},
    ),
    Case(
        "SD3Transformer2DModel-3.5",
        lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
        sd3_inputs,
        {
            "SD35AdaLayerNormZeroX": 1,
            "AdaLayerNormZero": 2,
            "AdaLayerNormContinuous": 2,
            "JointAttnProcessor2_0": 3,
            "LayerNorm": 3,
            "FeedForward": 3,
        },
    ),
    Case(
        "FluxTransformer2DModel",
        flux,
        flux_inputs,
        {
            "AdaLayerNormZero": 2,
            "AdaLayerNormZeroSingle": 2,
            "AdaLayerNormContinuous": 1,
            "FluxAttnProcessor": 3,
            "LayerNorm": 2,
            "FeedForward": 2,
            "Linear": 2,
        },
    ),
    Case("WanTransformer3DModel", wan, wan_inputs, {"WanAttnProcessor": 4, "FP32LayerNorm": 4, "FeedForward": 2}),
]
BY_NAME = {case.name: case for case in CASES}
