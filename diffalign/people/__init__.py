"""Choices of one person: the page in the browser and the file that it writes."""
