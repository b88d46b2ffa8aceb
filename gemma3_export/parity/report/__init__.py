"""The parity report: one model, rendered for the terminal and as JSON, JUnit XML and HTML."""
