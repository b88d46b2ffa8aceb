"""The command line: thin commands that parse, call the API and print.

Every command lives in a module of its own, ``<name>_command``, which is imported when it is needed;
what is heavy (torch, ONNX Runtime) is imported inside the commands that use it.
"""

from gemma3_export.cli.command_line import command_line, main

__all__ = ["command_line", "main"]
