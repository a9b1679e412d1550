"""Reads training runs of other tools, and predicts them: what was trained where, and what was
measured."""
