"""Emulates slower devices on this machine, so that a mixed cluster can be tried without one."""
