"""Stages over gRPC: one framing, one runner, one servicer."""
