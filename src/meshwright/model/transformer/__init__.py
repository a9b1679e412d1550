"""Transformers described once: counted without torch, and executed as modules of the zoo."""
