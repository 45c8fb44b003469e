"""The coordinator: takes requests, orders stages, keeps its state in Redis. Free of torch."""
