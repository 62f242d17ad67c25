"""Text to token ids and back, chat templates, and packed rows."""
