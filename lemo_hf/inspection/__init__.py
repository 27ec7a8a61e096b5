"""A look at one text: what layers need of it, and what policies keep."""
