"""Request state in Redis: records, events, results, workers, slots."""
