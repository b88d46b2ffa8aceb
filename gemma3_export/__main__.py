"""``python -m gemma3_export`` is the command ``gemma3-export``."""

from gemma3_export.cli import main

main()
