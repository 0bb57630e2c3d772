"""The networks: causal DiT, Wan VAE, UMT5 text encoder, and the loading of their weights."""
