"""The StableLM family."""
