"""Parallel execution of a DiT on several ranks: mesh, plans, collectives, sharded layers and attention."""
