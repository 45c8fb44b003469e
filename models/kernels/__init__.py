"""Kernels for GPUs: the optional packages that bring them, attention backends, and the committed choice tables."""
