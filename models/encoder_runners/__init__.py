"""Runners of transformers' encoders: texts and images to conditioning."""
