"""Pairs per second and peak memory of our Diffusion-DPO step against the released one, in one process.

    python benchmarks/pair_step.py                       # playground size, CPU
    python benchmarks/pair_step.py --size sd15           # SD1.5 size, random weights, GPU

The baseline restates the step of the released code: every step it encodes images and captions, holds a second U-Net as
the reference and runs it on the same batch. Ours reads cached latents and embeddings. Same model, batch and precision;
the two alternate, so that whatever else the machine does hits both. Writes benchmarks/results/pair_step.json.
"""
