"""The scheduler of a distilled student. Its module's name stands in the folders that pipelines are saved to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["StudentScheduler"]


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Takes a distilled student through its own noise levels in the pipelines of diffusers; made by `student_scheduler`.

    The pipeline's latents are what the network is given, y = input_scale x for unscaled x, so that nothing is left to scale before a call.
    A step is D = skip x + out o, with o the network's output, and then a draw from q(x_s | x_t, x0 = D) (arXiv 2406.04103, Algorithm 1)::

        x_s = r x_t + (1 - r) D + s sqrt(1 - r) noise,    r = (s / t)^2

    The last step, and the only one of a one-step student, returns D.

    Args, all of the config:
        sigmas: the levels the network is called at, falling.
        timesteps: the network's timestep at each, as pipelines count them. Need not be whole numbers.
        input_scale, skip, out: the coefficients at each.
        num_train_timesteps: the teacher's. use_flow_sigmas: whether it is a flow model, whose pipelines then hand over no levels.

    Attributes:
        timesteps: float32 [num_steps]. sigmas: float32 on the CPU [num_steps + 1], the final 0 included.
        init_noise_sigma: what the pipeline multiplies its noise by. Pipelines that do not (DiT, DDPM, SD3, Flux, Wan) want
            `latents=scheduler.init_noise_sigma * noise` where they take any; for sigma = 80 it is 0.9999 (0.9877 for a flow).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float] = (80.0,),
        timesteps: Sequence[float] = (999.0,),
        input_scale: Sequence[float] = (1.0,),
        skip: Sequence[float] = (1.0,),
        out: Sequence[float] = (-80.0,),
        num_train_timesteps: int = 1000,
        use_flow_sigmas: bool = False,
    ) -> None:
        lengths = {len(values) for values in (sigmas, timesteps, input_scale, skip, out)}
        if lengths != {len(sigmas)} or not sigmas:
            raise ValueError(f"sigmas, timesteps, input_scale, skip and out must be equally long and not empty, got lengths {lengths}")
        self.init_noise_sigma = sigmas[0] * input_scale[0]
        self.set_timesteps()

    @property
    def step_index(self) -> int:
        """How many steps were taken."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines say here that they begin at the first step; a student begins nowhere else."""
        if begin_index != 0:
            raise ValueError(f"begin_index must be 0, where a student begins, got {begin_index}")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None, mu: float | None = None
    ) -> None:
        """Begins a trajectory.

        Args:
            num_inference_steps: the student's number of steps.
            device: of `timesteps`.
            mu: the shift that pipelines of flow models compute for a resolution; not looked at, since the levels are the student's.

        Raises:
            ValueError: another number of steps.
        """
        config = self.config
        if num_inference_steps not in (None, len(config.sigmas)):
            raise ValueError(f"num_inference_steps must be {len(config.sigmas)}, the student's, got {num_inference_steps}")
        self.num_inference_steps = len(config.sigmas)
        self.timesteps = torch.tensor(config.timesteps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([*config.sigmas, 0.0], dtype=torch.float32)
        self._step_index = 0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: the pipeline holds what the network is given."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step, in order; timestep is not looked at, since two levels can lie at one.

        Args:
            model_output, sample: [B, ...], the network's output and what it was given.
            generator: of the noise.

        Returns:
            prev_sample, in sample's dtype, and pred_original_sample, D.

        Raises:
            RuntimeError: all steps were taken; `set_timesteps` begins anew.
        """
        config, index = self.config, self._step_index
        if index == len(config.sigmas):
            raise RuntimeError(f"all {index} steps of the student were taken; call set_timesteps to begin anew")
        wide = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(wide) / config.input_scale[index]
        denoised = moved = config.skip[index] * x + config.out[index] * model_output.to(wide)
        self._step_index += 1
        if self._step_index < len(config.sigmas):
            t, s = config.sigmas[index : index + 2]
            kept = (s / t) ** 2
            added = (t - s) * (t + s) / t**2  # 1 - kept, without cancelling
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=wide)
            moved = config.input_scale[index + 1] * (kept * x + added * denoised + s * math.sqrt(added) * noise)
        denoised, moved = denoised.to(sample.dtype), moved.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=moved, pred_original_sample=denoised) if return_dict else (moved, denoised)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
