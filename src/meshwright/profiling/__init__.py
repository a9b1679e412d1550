"""Measures the times of layers, optimizers and links on the devices themselves."""
