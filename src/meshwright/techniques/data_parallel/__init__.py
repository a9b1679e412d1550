"""Replicas of a stage train on different rows, and sum their gradients.

They do so in buckets while the backward still runs (Li et al., "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training", VLDB 2020).
"""
