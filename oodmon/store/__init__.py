"""The database: facts, outbox, pipeline state and feed positions."""
