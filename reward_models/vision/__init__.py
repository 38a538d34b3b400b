"""Scorers on image towers without text: SigLIP's and DINO's."""
