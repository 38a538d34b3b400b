"""Model families, one file each: the parts of a pipeline, and its network as `denoiser(x_t, t, cond)`."""
