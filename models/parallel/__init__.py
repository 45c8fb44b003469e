"""How a DiT is computed by several ranks: mesh, plans, collectives, sharded layers, attention over shards."""
