"""The decoding service: latents to files."""
