"""Fused kernels and distillers that make diffusion models fast."""
