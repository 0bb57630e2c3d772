"""Training of the tiny LongLive on Moving Shapes (`longlive_opt.tiny.shapes`): VAE, text encoder, causal
teacher by teacher forcing, few-step student by self forcing. Nothing that streams a video imports this
package.
"""
