"""The standard stages. No model is named in them."""
