"""Transformers described once, as an Architecture and a forward in abstract operations.

The same description is counted without torch (`counted_graph`) and executed by the modules of the
zoo (`model.zoo.described`).
"""
