"""NVIDIA Triton: write a model repository, and run it in Triton's Python backend."""
