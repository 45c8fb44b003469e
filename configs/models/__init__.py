"""Architecture parameters, read from the config.json of a checkpoint's modules."""
