"""The parity report: one model, rendered for the terminal, JSON, JUnit and HTML."""
