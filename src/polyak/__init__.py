"""Averages of the weights of PyTorch models."""
