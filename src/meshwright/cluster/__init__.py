"""Describes the hardware: devices, nodes, sites and links."""
