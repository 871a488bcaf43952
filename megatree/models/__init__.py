"""Models as parameter trees and segments, and the names that other formats give their leaves.

Import from the modules: `gpt_config` needs no torch, and the command line's help is quick by that.
"""
