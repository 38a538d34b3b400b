"""diffalign: align text-to-image diffusion models with human preference, and prove that it worked."""

__version__ = "0.1.0"
