"""One SamplingParams a family: what a request may set, with defaults and bounds. Free of torch."""
