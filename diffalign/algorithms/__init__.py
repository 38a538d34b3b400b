"""Alignment methods, one file each."""
