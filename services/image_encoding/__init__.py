"""The image_encoding service: pictures become conditioning and latents."""
