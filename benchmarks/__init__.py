"""Measurements that stand beside a baseline of the same run; see README.md."""
