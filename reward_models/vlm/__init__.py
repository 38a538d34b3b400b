"""Scorers that are vision-language models: one class, and a row for each named scorer."""
