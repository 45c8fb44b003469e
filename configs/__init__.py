"""What differs between models, as data: sampling parameters, pipeline callbacks, architectures."""
