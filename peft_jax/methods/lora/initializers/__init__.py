"""How LoRA's factors are initialized."""
