"""Autoencoders: encoding, normalisation and decoding."""
