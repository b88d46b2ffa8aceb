"""Train Gemma 3 from a text to a folder that exports: data, loop, checkpoints, record."""
