"""The standard stages, and the stages of hybrid models in model_specific_stages."""
