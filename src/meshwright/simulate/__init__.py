"""Simulates a program with the prices of the cost model."""
