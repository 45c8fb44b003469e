"""The latent preparation service: starting noise and steps."""
