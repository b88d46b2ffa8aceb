"""Tools for developers, not in the wheel: measurements, peers, and training the demo model."""
