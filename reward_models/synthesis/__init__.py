"""Preference data from scorers and judges: what they said, kept on disk; votes, pairs and ranked groups."""
