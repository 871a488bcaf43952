"""Processes: collectives, drivers, the step and what it updates in place."""
