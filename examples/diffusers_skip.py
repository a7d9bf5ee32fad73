"""Adaptive skipping in a Stable Diffusion pipeline: one line, no callback, and the count of calls it saved.

    python examples/diffusers_skip.py --out skipped.png

The pipeline is Stable Diffusion's own class around a small U-Net and decoder with random weights; prompts are given as embeddings. How far
the picture moves from the one with all calls is a matter of the threshold, and printed as peak signal-to-noise ratio. The file has the
picture with all calls and one for each threshold, side by side.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from fastdiff_kernels.integrations.diffusers import disable_adaptive_skip, enable_adaptive_skip, patch


def pipeline() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae.eval(), None, None, unet.eval(), scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(steps: int = 50, thresholds: tuple[float, ...] = (0.003, 0.01, 0.03), out: Path | None = None) -> dict[float, tuple[int, float]]:
    """Calls saved and PSNR in dB, by threshold."""
    pipe = pipeline()
    patch(pipe)
    prompt, nothing = torch.randn(2, 1, 12, 32, generator=torch.Generator().manual_seed(1))

    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        given = {"prompt_embeds": prompt, "negative_prompt_embeds": nothing, "generator": generator, "output_type": "pt"}
        return pipe(num_inference_steps=steps, **given).images

    full, found = image(), {}
    pictures = [full]
    for threshold in thresholds:
        handle = enable_adaptive_skip(pipe, threshold)
        pictures.append(image())
        error = float((pictures[-1] - full).square().mean())
        psnr = math.inf if error == 0 else -10 * math.log10(error)
        found[threshold] = (handle.saved, psnr)
        print(f"threshold {threshold}: {handle.saved} of {handle.calls} calls saved, {psnr:.1f} dB from the picture with all of them")
    disable_adaptive_skip(pipe)
    if out is not None:
        pixels = torch.cat([x[0].permute(1, 2, 0) for x in pictures], 1).repeat_interleave(4, 0).repeat_interleave(4, 1) * 255
        Image.fromarray(pixels.numpy().astype(np.uint8)).save(out)
        print(f"wrote {out}: all calls, thresholds {', '.join(map(str, thresholds))}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("skipped.png"))
    main(out=parser.parse_args().out)
