"""Find the fastest way to train a model on the machines you have, and train it that way."""

__version__ = "0.1.0"
