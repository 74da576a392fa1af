"""OpenAI's gpt-oss."""
