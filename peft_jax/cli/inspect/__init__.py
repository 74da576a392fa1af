"""`peft-jax inspect`."""
