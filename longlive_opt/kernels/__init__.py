"""Fused GPU kernels as PyTorch operators, each with a plain PyTorch form for CPUs.

quantize     8-bit cache formats: `allocate_kv`, `QuantizedKV`, the reference writer
attention8   `attention8(q, cache, num_keys)`, attention over those caches; `Tile`, `default_tile`
fused        LayerNorm + modulation, gated residuals, RMS norm + RoPE + cache write, cache write alone
conv3d       convolutions of the VAE's decoder, RMS norm + SiLU
attention8_reference   the arithmetic of the attention kernels, and float32 attention

The kernels are in the `_triton` and `_gluon` modules. These modules need Triton and are imported at the first
call on a CUDA tensor, so everything else loads without it.
"""
