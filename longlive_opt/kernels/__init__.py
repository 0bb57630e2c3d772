"""Fused GPU kernels as PyTorch operators, each with a plain PyTorch form that CPUs run.

quantize     8-bit cache formats: `allocate_kv`, `QuantizedKV`, the reference writer
attention8   `attention8(q, cache, num_keys)`, attention that eats them; `Tile`, `default_tile`
fused        LayerNorm + modulation, gated residuals, RMS norm + RoPE + cache write, cache write alone
conv3d       causal, frame-doubling and enlarging convolutions of the VAE's decoder, its norm with SiLU
emulation    the arithmetic of the attention kernels, and float32 attention

The kernels are in the modules called `_triton` and `_gluon`: these import Triton, and are imported at the
first call on a CUDA tensor, so that everything else loads without it.
"""
