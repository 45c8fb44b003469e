"""The denoising service: the loop over the transformer."""
