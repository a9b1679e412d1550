"""Predicts the seconds and the bytes of every instruction."""
