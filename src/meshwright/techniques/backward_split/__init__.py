"""Splits backwards in two parts, of which the second fills time that would be idle.

First come the gradients that the previous stage waits for, later those of the weights (2BP, Rae et
al. 2024; zero bubble, Qi et al. 2023).
"""
