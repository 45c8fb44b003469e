"""Model-independent code of all services: artifacts, stages, pipelines, errors, transport, state."""
