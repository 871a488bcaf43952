"""Tests of megatree; the folders mirror the package."""
