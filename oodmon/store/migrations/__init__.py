"""Alembic's folder: `env.py` joins it to a connection of `schema.upgrade`."""
