"""Models as parameter trees and segments, and the names that other formats give their leaves."""

from megatree.models.gpt import GPTConfig, gpt

__all__ = ["GPTConfig", "gpt"]
