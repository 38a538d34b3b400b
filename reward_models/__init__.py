"""reward_models: score images against prompts, differentiably, with one protocol for every scorer."""
