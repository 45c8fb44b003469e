"""The standard stages, which contain no model-specific code."""
