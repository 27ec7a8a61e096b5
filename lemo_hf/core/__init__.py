"""One sparse pass: hooks, policies, layers, loss."""
