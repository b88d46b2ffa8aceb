"""The generation loop: requests, sampling, candidates, speculation, prefix cache."""
