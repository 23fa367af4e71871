"""Files of torch.save, read as data: no code of theirs runs."""
