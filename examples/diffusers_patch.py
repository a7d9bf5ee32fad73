"""A DiT, a PixArt and a Stable-Diffusion-like U-Net of diffusers, patched and sampled; the same pictures as without the patch.

    python examples/diffusers_patch.py --out patched.png

The models are small and built from a config with random weights: nothing is downloaded. With weights of your own, `patch(pipeline)` is the
one line that changes. The picture has a row for each model: two samples without the patch, the same two with it, and 1000 times what
differs (three latent channels as colours; random weights paint no more than noise).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff_kernels.diffusion import Schedule, sample
from fastdiff_kernels.integrations.diffusers import as_denoiser, patch, unpatch


def models(size: int) -> dict[str, tuple[nn.Module, dict[str, object]]]:
    """Networks and what they are conditioned on, for two samples."""
    width = {"num_attention_heads": 4, "attention_head_dim": 72, "num_layers": 4, "sample_size": size}
    text = torch.randn(2, 20, 64)
    return {
        "DiT": (diffusers.DiTTransformer2DModel(**width, out_channels=8), {"class_labels": torch.tensor([3, 7])}),
        "PixArt": (
            diffusers.PixArtTransformer2DModel(**width, cross_attention_dim=288, caption_channels=64, use_additional_conditions=False),
            {
                "encoder_hidden_states": text,
                "encoder_attention_mask": (torch.arange(20) < torch.tensor([[20], [9]])).long(),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
        "U-Net": (
            diffusers.UNet2DConditionModel(
                sample_size=size,
                block_out_channels=(64, 128),
                layers_per_block=1,
                cross_attention_dim=64,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            {"encoder_hidden_states": text},
        ),
    }


def picture(rows: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """Samples [2, 4, H, W] without and with the patch, and how they differ, four times enlarged."""
    strips = []
    for plain, fused in rows:
        scale = plain.abs().max()
        shown = torch.cat((plain, fused, 1000 * (fused - plain)))[:, :3] / scale  # [6, 3, H, W]
        strips.append(shown.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2))  # [H, 6 W, 3]
    pixels = ((torch.cat(strips) + 1) * 127.5).repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)


def main(size: int = 32, steps: int = 6, out: Path | None = None) -> dict[str, float]:
    """Prints what was replaced and how long sampling takes; returns the largest difference of any sample, by model."""
    torch.manual_seed(0)
    differences, rows = {}, []
    for name, (model, conditioning) in models(size).items():
        denoiser = as_denoiser(model.eval(), diffusers.DDIMScheduler())
        noise, schedule = torch.randn(2, 4, size, size), Schedule.karras(steps, 0.03, 80.0)

        def run(denoiser=denoiser, noise=noise, schedule=schedule, conditioning=conditioning) -> tuple[Tensor, float]:
            begin = time.perf_counter()
            return sample(denoiser, noise, schedule, solver="euler", conditioning=conditioning).samples, time.perf_counter() - begin

        run()
        plain, before = run()
        print(patch(model))
        fused, after = run()
        unpatch(model)
        rows.append((plain, fused))
        differences[name] = float((plain - fused).abs().max() / plain.abs().max())
        print(f"{name}: {steps} steps in {before:.2f} s, patched in {after:.2f} s; largest relative difference {differences[name]:.1e}\n")
    if out is not None:
        picture(rows, out)
        print(f"wrote {out}: rows {', '.join(differences)}")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("patched.png"))
    main(out=parser.parse_args().out)
