"""The command line, `fleet`."""
