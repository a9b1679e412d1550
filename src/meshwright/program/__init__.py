"""Turns a plan into a program: for every rank, the list of its instructions in one step."""
