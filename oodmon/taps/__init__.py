"""Where activations are read: hooks on a running model, or a replay from files."""
