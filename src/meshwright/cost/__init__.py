"""Seconds and bytes of each instruction."""
