"""What every service shares and no model is in: artifacts, stages, pipelines, errors, transport, request state."""
