"""Plays a program on PyTorch."""
