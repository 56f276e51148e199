"""Shipped conformity checks: every component, plugins included, is held to its contract."""
