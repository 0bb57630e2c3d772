"""This implementation compared with recorded tensors."""
