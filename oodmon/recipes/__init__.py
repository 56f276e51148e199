"""Training recipes: heads and losses that give a retrained model a native score."""
