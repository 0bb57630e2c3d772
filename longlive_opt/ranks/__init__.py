"""One stream on several ranks: processes with one GPU each (or, with `device: cpu`, none).

`group` moves tensors between them, `heads` splits a transformer pass, `processes` starts, watches and ends
them. What the ranks compute together is in `optimizations.several_gpus`.
"""
