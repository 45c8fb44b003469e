"""What text becomes: tokenizing and encoding, by family."""
