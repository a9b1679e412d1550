"""Replicas of a stage that train on different rows, and sum their gradients in buckets while the
backward still runs (Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", VLDB 2020).
"""
