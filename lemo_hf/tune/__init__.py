"""Predictors and thresholds, which are made for a model before training, and measurements of
them."""
