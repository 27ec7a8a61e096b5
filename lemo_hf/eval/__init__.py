"""Evaluation of models, LeMo or not: perplexity, LongBench, retrieval."""
