"""Autoencoders: scaling and decoding."""
