"""Tests of the maths on plain tensors."""
