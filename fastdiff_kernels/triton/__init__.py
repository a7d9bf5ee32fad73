"""Triton kernels and their launchers, one family a file; imported on first use."""
