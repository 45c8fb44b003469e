"""The coordinator: accepts requests, runs their stages on workers, keeps its state in Redis. Does not import torch."""
