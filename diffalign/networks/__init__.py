"""The networks: loading, precision and placement, LoRA, reference, EMA, sampling, score networks, export."""
