"""Finds a fast plan: enumerates candidates, estimates their steps, and simulates the best ones."""
