"""Quantise weights into blocks: round to nearest, GPTQ, mixed, or GGUF blocks as stored."""
