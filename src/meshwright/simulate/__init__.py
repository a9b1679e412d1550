"""Plays a program on the cost model."""
