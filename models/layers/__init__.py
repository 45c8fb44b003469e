"""Layers that several DiTs share; attention.py has the only entry point for attention."""
