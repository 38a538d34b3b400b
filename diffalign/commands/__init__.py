"""The command `diffalign`: its parser, the launching of recipes, sweeps, the demo, exit codes."""
