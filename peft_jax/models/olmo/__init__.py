"""The OLMo family: OLMo 2 and 3."""
