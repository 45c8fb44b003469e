"""The denoising service, which runs the denoising loop of a model."""
