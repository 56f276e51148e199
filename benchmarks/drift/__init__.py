"""Drift tests side by side: run length, delay, speed and state on the same streams and seeds."""
