"""The driver: checks a call, picks what runs, and runs it."""
