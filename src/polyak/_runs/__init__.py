"""Runs: which checkpoints a run's folder has, in which order, and how good each is.

`finding` finds them and `clocks` finds their steps; `tables` and `metrics` read what trainers write
beside; `choosing` selects. Nothing here reads a tensor.
"""
