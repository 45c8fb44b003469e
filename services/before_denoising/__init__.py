"""The before_denoising service: all work before denoising, for models of the hybrid style."""
