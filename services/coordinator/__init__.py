"""The coordinator: accepts requests, runs their stages on workers, stores its state in Redis. Imports no torch."""
