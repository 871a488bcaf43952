"""The `megatree` command."""

from megatree.cli.main import main

__all__ = ["main"]
