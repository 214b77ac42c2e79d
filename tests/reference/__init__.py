"""Oracles: slow, obvious, without any import from inside the package."""
