"""Implements other planners, as published, on their own inputs: the search compares its plans with
theirs."""
