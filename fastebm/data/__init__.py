"""Data sets, and files of the user's own."""
