"""What only developers run: measurements, peers, the recorded training. Not in the wheel."""
