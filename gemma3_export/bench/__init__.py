"""Measure a bundle, alone or against other engines in the same run."""
