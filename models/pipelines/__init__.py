"""Pipelines: one torch-free file per family, with `EntryClass` and `register_configs()`."""
