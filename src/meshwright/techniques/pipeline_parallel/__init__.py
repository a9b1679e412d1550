"""Stages hand activations and their gradients to each other, whatever the widths of their meshes.

Each device receives what it needs from one device of the other side, or the devices of a replica
receive parts and gather them, or one device sends to all (Zhuang et al., "On Optimizing the
Communication of Model Parallelism", MLSys 2023).
"""
