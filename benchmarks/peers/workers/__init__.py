"""benchmarks/peers/workers."""
