"""Architecture parameters of the transformers."""
