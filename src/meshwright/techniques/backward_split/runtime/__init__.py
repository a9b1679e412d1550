"""Carries out split backwards on PyTorch."""
