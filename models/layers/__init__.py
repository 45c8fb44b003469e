"""Layers that transformers share; attention has its single entry point here."""
