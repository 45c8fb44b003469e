"""The denoising service, which runs the denoising loop over the transformer."""
