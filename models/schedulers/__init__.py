"""Solvers whose state belongs to one request, so that a loop can be resumed."""
