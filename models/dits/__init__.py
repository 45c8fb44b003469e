"""The diffusion transformers, single-device, with the parameter names of their checkpoints."""
