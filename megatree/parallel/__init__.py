"""Layouts, types, transitions and lowering: values only, no process."""
