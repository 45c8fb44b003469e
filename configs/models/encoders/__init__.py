"""How text becomes conditioning."""
