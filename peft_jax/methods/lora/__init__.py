"""LoRA, its variants and its initializers."""
