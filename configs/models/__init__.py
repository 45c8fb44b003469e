"""Architecture parameters, parsed from the config.json of a checkpoint's modules."""
