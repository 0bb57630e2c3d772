"""The tiny model: its data, its training and its evaluation. No optimization imports it."""
