"""The StarCoder2 family."""
