"""Tests of the models on one device."""
