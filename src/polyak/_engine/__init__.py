"""The engine: a model's tensors, the slots of its averages, and how contents move between them."""
