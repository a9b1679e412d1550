"""Emulates a small mixed cluster on one Linux machine: namespaces, shaped links, slowed devices."""
