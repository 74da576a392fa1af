"""One adapter made of several on the same base."""
