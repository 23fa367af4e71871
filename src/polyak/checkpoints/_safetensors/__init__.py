"""Safetensors files: read, and written by one process or by all ranks."""
