"""Training data: records, templates, token ids and batches."""
