"""UMT5-XXL text encoder and its tokenizer: prompts -> [B, text_len, dim] (UMT5: arXiv:2304.09151).

Parameter names are those of `models_t5_umt5-xxl-enc-bf16.pth`. Always the full `text_len` rows are computed,
as in LongLive: padding keys get weight exactly 0, so cutting them off would only change the order of sums.

The tokenizer is read from `tokenizer.json` with the `tokenizers` library, not by transformers' AutoTokenizer:
transformers 5 rebuilds a T5 tokenizer from its vocabulary and drops the normalizer that the file holds.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import ftfy
import torch
from torch import Tensor, nn

from ..config import TextEncoderConfig
from ..errors import UserError
from ..fetch import FETCH_COMMAND
from .dit import RMSNorm

logger = logging.getLogger(__name__)

NORM_EPS = 1e-6
PAD_ID, END_ID = 0, 1
BYTE_OFFSET = 3  # ByT5 keeps ids 0, 1, 2 for padding, end and unknown
FINGERPRINT_SAMPLES = 64
FETCH_TEXT = f"{FETCH_COMMAND} DIR --what text"


class SelfAttention(nn.Module):
    """Bidirectional attention with an additive position bias and, as in every T5, no 1/sqrt(D) scale."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, dim], bias [B, N, L, L] (query, key) -> [B, L, dim]"""
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) + bias).float().softmax(-1).to(x.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x))); the GELU rounds once where LongLive's bf16 run rounds every step of it."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False),
                                  nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class PositionBias(nn.Module):
    """One number per head and distance bucket; UMT5 has a table in every layer, T5 only in the first."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets [L, L] (query, key) -> [N, L, L]"""
        return self.embedding(buckets).permute(2, 0, 1)


class EncoderBlock(nn.Module):
    """x += attention(norm1(x)); x += feed_forward(norm2(x))"""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.dim, NORM_EPS)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(config.dim, NORM_EPS)
        self.ffn = GatedFeedForward(config)
        self.pos_embedding = PositionBias(config)

    def forward(self, x: Tensor, buckets: Tensor, padding: Tensor) -> Tensor:
        """x [B, L, dim], buckets [L, L], padding [B, 1, 1, L] (True: no token) -> [B, L, dim]"""
        bias = self.pos_embedding(buckets).masked_fill(padding, torch.finfo(x.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """UMT5 encoder: 242 tensors and 5,680,910,336 parameters for the default config."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, NORM_EPS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids [B, L] with mask [B, L] (1: token, 0: padding) to [B, L, dim].

        Rows at padding positions are computed like the others and mean nothing; `TextEncoder` zeroes them.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        distance = position - position[:, None]
        buckets = distance_bucket(distance, self.config.num_buckets, self.config.max_distance)
        padding = mask[:, None, None, :] == 0
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, padding)
        return self.norm(x)


def distance_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of a distance key - query in tokens (arXiv:1910.10683): exact when near, then logarithmic.

    Half of the buckets serve each sign; from `max_distance` on every distance shares the last one.
    """
    per_sign = num_buckets // 2
    exact = per_sign // 2
    away = distance.abs()
    logarithm = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (per_sign - exact)).long()).clamp(max=per_sign - 1)
    return torch.where(away < exact, away, far) + per_sign * (distance > 0)


@dataclass(frozen=True)
class Tokenizer:
    """Prompts to padded ids.

    `kind` names the vocabulary, `fingerprint` identifies its contents, and `to_ids` turns one cleaned text
    into ids with the end token last.
    """

    kind: str
    fingerprint: str
    vocab_size: int
    text_len: int
    to_ids: Callable[[str], list[int]]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of the cleaned prompts, int64 [B, text_len]; cuts a longer one and logs a warning."""
        ids = torch.full((len(prompts), self.text_len), PAD_ID)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.to_ids(clean(prompt))
            if len(tokens) > self.text_len:
                logger.warning("prompt cut from %d to %d tokens: %.60r", len(tokens), self.text_len, prompt)
                tokens = [*tokens[:self.text_len - 1], END_ID]
            ids[row, :len(tokens)] = torch.tensor(tokens)
            mask[row, :len(tokens)] = 1
        return ids, mask


def clean(text: str) -> str:
    """Mend broken Unicode, resolve HTML entities (twice, for the doubly escaped) and collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def load_tokenizer(source: str | Path, text_len: int) -> Tokenizer:
    """The tokenizer in the folder `source`, or for "bytes" a stand-in that needs no file.

    The stand-in maps UTF-8 bytes to ids in the manner of ByT5 (arXiv:2105.13626). It is for random weights,
    where a token means nothing, and calls itself a stand-in.

    Raises:
        UserError: the folder has no readable T5 tokenizer, or the `tokenizers` package is missing.
    """
    if source == "bytes":
        return Tokenizer("bytes (stand-in for the UMT5 vocabulary)", "bytes-1", 256 + BYTE_OFFSET, text_len,
                         lambda text: [*(byte + BYTE_OFFSET for byte in text.encode("utf-8")), END_ID])
    path = Path(source) / "tokenizer.json"
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("tokenizer: a package is missing; run 'pip install tokenizers'.") from error
    if not path.is_file():
        raise UserError(f"tokenizer: {path} does not exist; download it with '{FETCH_TEXT}'.")
    content = path.read_bytes()
    try:
        pipeline = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises plain Exception for every parse failure
        raise UserError(f"tokenizer: {path} is not a readable tokenizer file ({error}); download it again "
                        f"with '{FETCH_TEXT}'.") from error
    pipeline.no_padding()
    pipeline.no_truncation()
    if pipeline.token_to_id("<pad>") != PAD_ID or pipeline.encode("a").ids[-1:] != [END_ID]:
        raise UserError(f"tokenizer: {path} is not of the T5 family, where padding is id {PAD_ID} and every "
                        f"text ends with id {END_ID}; use the folder google/umt5-xxl of Wan2.1-T2V-1.3B.")
    return Tokenizer(Path(source).name, hashlib.sha256(content).hexdigest(), pipeline.get_vocab_size(),
                     text_len, lambda text: pipeline.encode(text).ids)


class TextEncoder:
    """Tokenizer and encoder together.

    `fingerprint` is a cache key: it changes with the tokenizer and with the encoder's weights, dtype or
    config. `description` is what a result records.
    """

    def __init__(self, module: UMT5Encoder, tokenizer: Tokenizer):
        """Raises: UserError: the tokenizer makes ids that the embedding table does not have."""
        if tokenizer.vocab_size > module.config.vocab_size:
            raise UserError(f"tokenizer: {tokenizer.kind} has {tokenizer.vocab_size} tokens, the encoder "
                            f"only {module.config.vocab_size}; use the tokenizer of these weights.")
        self.module = module
        self.tokenizer = tokenizer
        key = [asdict(module.config), tokenizer.fingerprint, tokenizer.text_len, weights_fingerprint(module)]
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.description: dict[str, Any] = {
            "tokenizer": tokenizer.kind, "tokenizer_fingerprint": tokenizer.fingerprint,
            "text_len": tokenizer.text_len, "fingerprint": self.fingerprint}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to [B, text_len, dim], rows after each prompt's end token zero.

        One prompt at a time, so that a prompt gives the same bits whatever it is encoded together with.

        Raises:
            UserError: `prompts` is one string, empty, or holds something that is not a string.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts: {prompts!r:.80} is not a list of texts; write ['first prompt', ...].")
        device = self.module.token_embedding.weight.device
        ids, mask = (t.to(device) for t in self.tokenizer(prompts))
        hidden = torch.cat([self.module(ids[i:i + 1], mask[i:i + 1]) for i in range(len(prompts))])
        return hidden.masked_fill(mask[..., None] == 0, 0)


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of every tensor's name, shape, dtype and some evenly spaced values; cheap at any model size."""
    digest, samples = hashlib.sha256(), []
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        stride = max(1, tensor.numel() // FINGERPRINT_SAMPLES)
        samples.append(tensor.flatten()[::stride][:FINGERPRINT_SAMPLES].float())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()
