"""Judges: models behind an HTTP server in the OpenAI chat schema that rate or compare images."""
