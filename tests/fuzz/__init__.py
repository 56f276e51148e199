"""Hostile bytes for everything that reads bytes: no crash, no hang, no memory beyond measure."""
