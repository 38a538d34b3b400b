"""One file for each alignment method."""
