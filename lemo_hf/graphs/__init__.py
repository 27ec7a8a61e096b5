"""Sparse passes as CUDA graphs."""
