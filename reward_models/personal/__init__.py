"""Personal scorers, fitted to a few choices of one person."""
