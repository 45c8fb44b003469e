"""One PipelineConfig per family: the model-specific callbacks of the standard stages."""
