"""The text encoding service: prompts to conditioning."""
