"""The models: pipelines, stages, transformers, encoders, schedulers, and how they are found and loaded."""
