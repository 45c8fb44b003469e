"""Runners of the encoders of transformers: texts and images to conditioning."""
