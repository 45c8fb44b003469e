"""One SamplingParams per family: the request parameters with defaults and bounds. Imports no torch."""
