"""State of the fleet in Redis: requests, events, results, workers and worker slots."""
