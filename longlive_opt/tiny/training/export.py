"""Export trained networks in bfloat16 to a weights folder that `models.weight_files` can read.

The tokenizer is the byte-level tokenizer of the training, written as a `tokenizer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import UserError
from ...files import atomic_path
from ...models.specs import MODELS
from ...models.text import BYTE_OFFSET, END_ID, PAD_ID
from ...models.vae import LATENT_MEAN, LATENT_STD, WanVAE


@torch.no_grad()
def fold_statistics(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Change conv1 and conv2 so that latents with channel mean `mean` and standard deviation `std`, float32
    [z] each, get LATENT_MEAN and LATENT_STD, as all code expects. The decoded frames stay the same.
    """
    if not bool((std > 1e-4).all()):
        raise UserError(
            f"vae: a latent channel is constant (deviations {std.tolist()}); train longer, or lower the "
            "weight of the KL term."
        )
    device = vae.conv1.weight.device
    to_mean, to_std, mean, std = (t.to(device, torch.float32) for t in (
        torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD), mean, std))
    z, gain = len(mean), to_std / std
    encode, decode = vae.conv1, vae.conv2
    encode.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    encode.bias[:z] = (encode.bias[:z] - mean) * gain + to_mean
    encode.bias[z:] += 2 * gain.log()  # the log variance follows the scale
    decode.bias += decode.weight[:, :, 0, 0, 0] @ (mean - to_mean / gain)
    decode.weight /= gain.view(1, -1, 1, 1, 1)


def export_weights(folder: Path, dit: Mapping[str, Tensor], text: Mapping[str, Tensor],
                   vae: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the weights folder and return the size of every file in bytes."""
    places, sizes = MODELS["tiny"].checkpoint.files, {}
    for part, tensors in (("dit", dit), ("text", text), ("vae", vae)):
        path = folder / places[part]
        with atomic_path(path) as temporary:
            save_file(
                {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()},
                temporary,
            )
        sizes[path.name] = path.stat().st_size
    path = folder / places["tokenizer"] / "tokenizer.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(byte_tokenizer(), ensure_ascii=False), encoding="utf-8")
    sizes[path.name] = path.stat().st_size
    return sizes


def byte_tokenizer() -> dict[str, object]:
    """`tokenizer.json` of the byte tokenizer: UTF-8 bytes from BYTE_OFFSET on, then the end token."""
    special = [("<pad>", PAD_ID), ("</s>", END_ID), ("<unk>", 2)]
    letters = _byte_letters()
    vocabulary = {**dict(special), **{letters[byte]: byte + BYTE_OFFSET for byte in range(256)}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for name, i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [END_ID], "tokens": ["</s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                  "merges": []}}


def _byte_letters() -> list[str]:
    """The character that the ByteLevel pre-tokenizer writes for each byte: the byte itself if it is visible
    Latin-1, else the next character from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]
