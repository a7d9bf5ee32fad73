"""Adapters to other people's codebases. A host is imported when its adapter is, and not before:

* `fastdiff_kernels.integrations.diffusers`: patch and unpatch models, denoisers from models and schedulers, adaptive skipping, a backend;
* `fastdiff_kernels.integrations.edm`: networks of EDM and EDM2;
* `fastdiff_kernels.integrations.dit`: the original DiT and what else has timm's attention;
* `fastdiff_kernels.integrations.k_diffusion`: HDiT's blocks, and denoiser wrappers both ways;
* `fastdiff_kernels.integrations.comfyui`: an attention override.
"""
