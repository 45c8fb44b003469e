"""Solvers with their state per request, so that a loop can be resumed."""
