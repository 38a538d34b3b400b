"""BLIP scorers: ImageReward, VP-Score."""
