"""Workers that run in the environments of peers, without this package."""
