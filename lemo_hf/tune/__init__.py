"""What is made for a model before training: predictors and thresholds, and how good they are."""
