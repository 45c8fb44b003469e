"""One file a family with `EntryClass` and `register_configs()`; the registry finds it by itself. Free of torch."""
