"""Samplers: one small file each."""
