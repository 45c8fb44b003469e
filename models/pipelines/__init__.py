"""Pipelines: one torch-free file per `_class_name`, with `EntryClass` and `register_configs()`."""
