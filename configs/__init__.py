"""Model-specific data: sampling parameters, pipeline callbacks, architectures."""
