"""Model handles: immutable pytrees of parameters that can be called, one module a task."""
