"""One PipelineConfig a family: what the standard stages ask of a model."""
