"""The way from agent to daemon, both ends in one file each."""
