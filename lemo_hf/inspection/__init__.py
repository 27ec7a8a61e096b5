"""Inspection of one text: which blocks layers need, and which policies keep."""
