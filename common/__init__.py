"""Model-independent code that all services share: artifacts, stages, pipelines, errors, transport, request state."""
