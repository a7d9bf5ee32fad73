"""A diffusers U-Net from training to a one-step pipeline: trained on digits, its schedule optimised, distilled by SIM, saved as a folder.

    python examples/diffusers_digits.py --out digits

writes digits/pipeline, which `diffusers.ConsistencyModelPipeline.from_pretrained` loads, and digits/samples.png: the teacher on a Karras
and on its own schedule at as many steps, and the student's one step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastdiff_kernels.demo.data import load_digits
from fastdiff_kernels.diffusion import Schedule, optimize_schedule, sample
from fastdiff_kernels.distill import ScoreTrainer, SIMDistiller
from fastdiff_kernels.integrations.diffusers import as_denoiser, patch, student_scheduler

SIGMA_MIN, SIGMA_MAX, SIGMA_INIT = 0.02, 40.0, 2.5


def unet(size: int, channels: int) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def picture(rows: dict[str, Tensor], path: Path) -> None:
    """One row of samples for each name, four times enlarged."""
    strips = [(x[:, 0].clamp(-1, 1).transpose(0, 1).flatten(1) + 1) * 127.5 for x in rows.values()]  # [H, n W] each
    pixels = torch.cat(strips).repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)


def main(out: Path, train: int = 1500, distil: int = 400, channels: int = 32, batch: int = 64, steps: int = 6) -> Tensor:
    """Runs it all; returns the pipeline's one-step samples."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # The pipeline wants three channels.
    data = load_digits().images.expand(-1, 3, -1, -1).contiguous()  # [N, 3, H, W], standard deviation 0.5
    # A noise prediction would have its errors multiplied by sigma.
    ddpm = diffusers.DDPMScheduler(prediction_type="v_prediction")
    model = unet(data.shape[-1], channels)
    print(patch(model))
    trainer = ScoreTrainer(as_denoiser(model, ddpm, sigma_data=0.5), learning_rate=1e-3)
    for _ in (bar := tqdm(range(train), "training", dynamic_ncols=True)):
        rows = torch.randint(len(data), (batch,))
        bar.set_postfix(loss=f"{trainer.step(data[rows])['loss']:.3f}", refresh=False)

    teacher, noise = trainer.generator, torch.randn(10, *data.shape[1:])
    schedule = optimize_schedule(teacher, data, steps, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, knots=64, batch_size=16)
    rows = {
        "Karras": sample(teacher, noise, Schedule.karras(steps, SIGMA_MIN, SIGMA_MAX)).samples,
        "optimised": sample(teacher, noise, schedule).samples,
    }
    sim = SIMDistiller(teacher, sample_shape=tuple(data.shape[1:]), sigma_init=SIGMA_INIT, learning_rate=2e-4)
    for _ in (bar := tqdm(range(distil), "distillation", dynamic_ncols=True)):
        bar.set_postfix(gap=f"{sim.step(batch)['gap']:.4f}", refresh=False)

    scheduler = student_scheduler(ddpm, sim, host_only=True)
    diffusers.ConsistencyModelPipeline(unet=sim.generator.model, scheduler=scheduler).save_pretrained(out / "pipeline")
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(out / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(10, num_inference_steps=1, latents=noise, output_type="pt").images
    picture({**rows, "one step": images * 2 - 1}, out / "samples.png")
    print(f"wrote {out / 'pipeline'} and {out / 'samples.png'}: rows {', '.join([*rows, 'one step'])}")
    return images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--train", type=int, default=1500)
    parser.add_argument("--distil", type=int, default=400)
    given = parser.parse_args()
    main(given.out, given.train, given.distil)
