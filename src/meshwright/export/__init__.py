"""Exports plans as the settings of other tools that can express them."""
