"""Layers that several DiTs share."""
