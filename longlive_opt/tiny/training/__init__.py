"""Train the tiny LongLive on Moving Shapes (`longlive_opt.tiny.shapes`): the variational autoencoder (VAE),
the text encoder, the causal teacher by teacher forcing, and the few-step student by self forcing. No module
that streams a video imports this package.
"""
