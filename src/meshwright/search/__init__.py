"""Finds the plan."""
