"""Patience: how long a test waits for another process before it takes it for hung.

It bounds no work: what ends by itself may take this long on the busiest machine.
"""

HANG = 900.0
