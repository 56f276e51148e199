"""Beside the store: reads the feed, concludes, persists, tells. Never imports torch."""
