"""Facts → one self-contained HTML file."""
