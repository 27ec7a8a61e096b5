"""One batch: its facts, its rows' counts, from scores to kept sets."""
