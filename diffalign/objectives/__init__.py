"""Objectives: preference losses, score divergences, and rewards from scorers."""
