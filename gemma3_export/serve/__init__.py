"""A server that speaks the OpenAI API over an :class:`gemma3_export.Engine`."""
