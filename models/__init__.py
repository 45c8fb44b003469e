"""Pipelines, stages, transformers, encoders and schedulers, with their registry and loaders."""
