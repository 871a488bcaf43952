"""Neighbouring formats, one file each, behind one protocol: boxes of named arrays in and out."""
