"""Constrain generated text to a JSON schema, a regular expression or function calls."""
