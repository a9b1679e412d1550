"""Stages keep only the inputs of their layers, and run each forward again in the backward.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""
