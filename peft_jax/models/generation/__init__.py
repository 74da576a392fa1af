"""Generation with causal models and encoder-decoders."""
