"""Scorers of one person, fitted to a few choices of theirs."""
