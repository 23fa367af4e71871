"""Ranks: this rank's part of a sharded tensor, and what the ranks of a group must agree on."""
