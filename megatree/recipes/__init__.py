"""Configs of runs, and the whole jobs that they describe.

`presets` has the recipes, `config` what they consist of, `job` runs one on a rank.
"""
