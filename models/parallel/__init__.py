"""Parallel execution of a DiT on several ranks: mesh, plans, collectives, layers and attention."""
