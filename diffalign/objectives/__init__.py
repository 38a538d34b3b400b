"""What is minimised: preference losses, divergences, rewards of scorers."""
