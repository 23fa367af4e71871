"""Folders of torch.distributed.checkpoint: read in one process, written and loaded by all ranks."""
