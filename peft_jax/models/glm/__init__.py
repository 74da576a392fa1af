"""The GLM family: GLM-4 in both forms."""
