"""The way from agent to daemon, both ends; and labels on their way from a topic."""
