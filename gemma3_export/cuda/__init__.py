"""Diagnose CUDA, and check where a graph's nodes run on a GPU without having one."""
