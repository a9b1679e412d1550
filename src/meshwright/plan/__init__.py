"""Defines the plan, the single description of a training strategy."""
