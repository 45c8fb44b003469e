"""Pipelines: one file per family with `EntryClass` and `register_configs()`, discovered by the registry; no torch."""
