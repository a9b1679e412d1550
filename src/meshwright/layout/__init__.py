"""Describes which part of a tensor each rank holds, and how to move from one layout to another."""
