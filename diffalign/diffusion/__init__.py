"""The mathematics of noise: schedules, sampling steps, noise levels and error weights, inversion. Loads no network."""
