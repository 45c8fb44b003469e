"""Diffusion transformers as single-device models, with the parameter names of their checkpoints."""
