"""The Cohere family: Command R and R7B."""
