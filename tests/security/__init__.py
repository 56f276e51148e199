"""One test for each promise of docs/security.md."""
