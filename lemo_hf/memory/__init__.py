"""What layers store for the backward: recomputation, offload, and what fits."""
