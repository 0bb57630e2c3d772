"""UMT5-XXL text encoder and its tokenizer: prompts -> [B, text_len, dim] (UMT5: arXiv:2304.09151).

Parameter names are those of `models_t5_umt5-xxl-enc-bf16.pth`. As in LongLive, the encoder always computes
all `text_len` rows. Padding keys get a weight of exactly 0, so cutting them off would only change the order
of sums.

The `tokenizers` library reads the tokenizer from `tokenizer.json`. Transformers' AutoTokenizer is not used,
because transformers 5 rebuilds a T5 tokenizer from its vocabulary and drops the file's normalizer.
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
from typing import Any, Callable, Mapping, Sequence

import ftfy
import torch
from torch import Tensor, nn

from ..errors import UserError
from .dit import RMSNorm
from .specs import FETCH_COMMAND, TextEncoderConfig

logger = logging.getLogger(__name__)

NORM_EPS = 1e-6
PAD_ID, END_ID = 0, 1
BYTE_OFFSET = 3  # ByT5 keeps ids 0, 1, 2 for padding, end and unknown
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
    """fc2(fc1(x) * gelu(gate(x))). GELU rounds once here; LongLive's bf16 run rounds each of its steps."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False),
                                  nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class PositionBias(nn.Module):
    """One number per head and distance bucket; UMT5 has a table in every layer, T5 only in the first one."""

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
        """Encode token ids [B, L] with mask [B, L] (1: token, 0: padding), on any device, to [B, L, dim].

        Rows at padding positions are computed like the others but have no meaning; `TextEncoder` zeroes them.
        """
        table = self.token_embedding.weight
        buckets, padding = self.positions(mask.to(table.device))
        x = self.token_embedding(ids.to(table.device))
        for block in self.blocks:
            x = block(x, buckets, padding)
        return self.norm(x)

    def positions(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Convert a mask [B, L] to a block's inputs: distance buckets [L, L] and padding [B, 1, 1, L]."""
        position = torch.arange(mask.shape[1], device=mask.device)
        distance = position - position[:, None]
        buckets = distance_bucket(distance, self.config.num_buckets, self.config.max_distance)
        return buckets, mask[:, None, None, :] == 0


def distance_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bucket for a distance key - query in tokens (arXiv:1910.10683): exact when near, then logarithmic.

    Half of the buckets cover each sign; all distances from `max_distance` on share the last bucket.
    """
    per_sign = num_buckets // 2
    exact = per_sign // 2
    away = distance.abs()
    logarithm = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (per_sign - exact)).long()).clamp(max=per_sign - 1)
    return torch.where(away < exact, away, far) + per_sign * (distance > 0)


@dataclass(frozen=True)
class Tokenizer:
    """Converts prompts to padded ids.

    `kind` names the vocabulary, `fingerprint` identifies its contents, and `to_ids` converts one cleaned text
    to ids that end with the end token.
    """

    kind: str
    fingerprint: str
    vocab_size: int
    text_len: int
    to_ids: Callable[[str], list[int]]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the cleaned prompts, int64 [B, text_len]; cut long ones with a warning."""
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
    """Repair broken Unicode, resolve HTML entities (twice, for double escapes) and collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def load_tokenizer(source: str | Path, text_len: int) -> Tokenizer:
    """Load the tokenizer in the folder `source`; "bytes" gives a stand-in that needs no file.

    The stand-in maps UTF-8 bytes to ids as ByT5 does (arXiv:2105.13626). It is for random weights, whose
    tokens have no meaning, and its `kind` says that it is a stand-in.

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
            raise UserError(f"tokenizer: {path} is no T5 tokenizer, where padding is id {PAD_ID} and every "
                        f"text ends with id {END_ID}; use the folder google/umt5-xxl of Wan2.1-T2V-1.3B.")
    return Tokenizer(Path(source).name, hashlib.sha256(content).hexdigest(), pipeline.get_vocab_size(),
                     text_len, lambda text: pipeline.encode(text).ids)


class TextEncoder:
    """Tokenizer and encoder together. The encoder is loaded at its first use, or by `load`.

    `fingerprint` is a cache key. It depends on the tokenizer and on the encoder's config and `identity`, and
    is known before the encoder is loaded. A result records `description` for the tokenizer and `report` for
    the encoder.
    """

    def __init__(self, config: TextEncoderConfig, tokenizer: Tokenizer, identity: str,
                 load: Callable[[str | None], tuple[UMT5Encoder, Mapping[str, Any]]],
                 hosted: Callable[[UMT5Encoder], nn.Module] | None = None):
        """Args:
            identity: distinguishes these weights, on this kind of device and in this dtype, from all others.
            load: makes the encoder and the report of its weights. Its argument is the device for the weights;
                None means the device that runs them.
            hosted: if given, keep the weights in host memory and run the module that this makes from them.

        Raises:
            UserError: the tokenizer makes ids that are not in the embedding table.
        """
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"tokenizer: {tokenizer.kind} has {tokenizer.vocab_size} tokens, but the encoder "
                            f"has only {config.vocab_size}; use the tokenizer of these weights.")
        self.config = config
        self.tokenizer = tokenizer
        self.identity = identity
        self._load = load
        self._hosted = hosted
        self._module: nn.Module | None = None
        key = [asdict(config), tokenizer.fingerprint, tokenizer.text_len, identity]
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.description: dict[str, Any] = {
            "tokenizer": tokenizer.kind, "tokenizer_fingerprint": tokenizer.fingerprint,
            "text_len": tokenizer.text_len, "fingerprint": self.fingerprint}
        self.report: dict[str, Any] = {"loaded": False}

    def hosted(self, make: Callable[[UMT5Encoder], nn.Module]) -> TextEncoder:
        """Return the same encoder, unloaded, with weights in host memory; `make` makes what runs."""
        return TextEncoder(self.config, self.tokenizer, self.identity, self._load, make)

    def load(self) -> nn.Module:
        """Return the module that runs, called like `UMT5Encoder.forward`; load it if necessary."""
        if self._module is None:
            module, report = self._load("cpu" if self._hosted else None)
            self._module = self._hosted(module) if self._hosted else module
            self.report.update(report, loaded=True)
        return self._module

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to [B, text_len, dim]; rows after each prompt's end token are zero.

        Prompts are encoded one at a time, so a prompt gives the same bits in any batch.

        Raises:
            UserError: `prompts` is a single string, is empty, or contains something other than a string.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"prompts: {prompts!r:.80} is not a list of texts; write ['first prompt', ...].")
        module = self.load()
        ids, mask = self.tokenizer(prompts)
        hidden = torch.cat([module(ids[i:i + 1], mask[i:i + 1]) for i in range(len(prompts))])
        return hidden.masked_fill(mask.to(hidden.device)[..., None] == 0, 0)
