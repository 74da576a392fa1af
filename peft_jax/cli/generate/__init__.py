"""`peft-jax generate`."""
