"""Starts the processes of a run, lets them meet, watches them and ends them."""
