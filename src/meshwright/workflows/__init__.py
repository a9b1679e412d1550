"""Runs the verbs of the command line from beginning to end, one file for each."""
