"""Targets: an energy as samplers see it."""
