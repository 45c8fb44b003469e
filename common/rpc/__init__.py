"""gRPC transport of stages: framing of tensors, client, servicer, server and TLS."""
