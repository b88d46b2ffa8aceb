"""The command line: thin commands that parse arguments, call the API and print the result.

Each command has its own module, ``<name>_command``, imported only when that command runs. Commands
import heavy packages (torch, ONNX Runtime) inside the function that needs them.
"""

from gemma3_export.cli.command_line import command_line, main

__all__ = ["command_line", "main"]
