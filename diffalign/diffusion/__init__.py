"""Diffusion mathematics: noise schedules, sampling steps, timestep sampling, error weights, DDIM inversion."""
