"""Devices of a replica divide each layer, and sum what they have computed inside it.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019.
"""
