"""Weight quantization: round to nearest, GPTQ, mixed precision, and blocks of GGUF files."""
