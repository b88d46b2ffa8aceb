"""Thin runtimes: one protocol, one sampler and one generation loop for every backend."""
