"""The command `reward-score`: images of a folder, tables of scores, reports, resuming."""
