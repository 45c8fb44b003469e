"""Architecture parameters of the autoencoders."""
