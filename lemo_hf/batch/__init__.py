"""One batch: its facts, the counts of its rows, and the way from scores to kept sets."""
