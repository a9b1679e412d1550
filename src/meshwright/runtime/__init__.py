"""Carries out a program on PyTorch: one process for each rank."""
