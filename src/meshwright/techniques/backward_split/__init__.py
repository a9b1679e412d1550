"""Backwards in two parts: first the gradients that the previous stage waits for, later those of the
weights, in time that would otherwise be idle (2BP, Rae et al. 2024; zero bubble, Qi et al. 2023).
"""
