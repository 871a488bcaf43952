"""Bytes in and out: data, checkpoints and foreign formats, with processes passed in as a value."""
