"""`peft-jax finetune`."""
