"""Train and fine-tune Gemma 3: data preparation, the training loop, checkpoints and metrics."""
