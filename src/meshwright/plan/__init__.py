"""The one description of a strategy."""
