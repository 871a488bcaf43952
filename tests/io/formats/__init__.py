"""Tests of neighbouring formats."""
