"""Compares this implementation with recorded tensors."""
