"""Low-rank pairs that make up for a layer's quantisation error before training starts."""
