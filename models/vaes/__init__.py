"""Autoencoders: encoding, normalization and decoding."""
