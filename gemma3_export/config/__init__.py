"""The model configuration: its dataclass, published presets, and every dialect it is read from."""
