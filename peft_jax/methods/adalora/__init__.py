"""AdaLoRA and its rank allocator."""
