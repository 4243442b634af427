"""Data sets by name, and the user's own files."""
