"""Low-rank pairs that make up for a layer's quantization error before training starts."""
