"""Tests of the native checkpoint."""
