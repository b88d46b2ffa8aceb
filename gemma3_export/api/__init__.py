"""The Python API: load and generate, export, verify. The command line calls nothing else."""
