"""Runners of transformers' encoders, which convert texts and images to conditioning."""
