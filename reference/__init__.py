"""The reference: the only definition of Gemma 3, its weights and its runtime (needs torch)."""
