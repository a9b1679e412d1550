"""Replicas divide the optimizer states among them: ZeRO stage 1.

Of the ranks that hold the same weights each updates an equal share of them and holds the optimizer
states of that share alone. Gradients are reduced and scattered instead of all-reduced, and updated
weights are gathered: the same number of bytes (Rajbhandari et al., "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models", SC 2020, section 5.1).
"""
