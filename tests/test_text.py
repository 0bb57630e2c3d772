"""UMT5 encoder against golden data, and the tokenizer around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longlive_opt.errors import UserError
from longlive_opt.models.specs import MODELS, TextEncoderConfig
from longlive_opt.models.text import (
    TextEncoder,
    Tokenizer,
    UMT5Encoder,
    clean,
    distance_bucket,
    load_tokenizer,
)

GOLDEN = Path(__file__).parent / "golden"
CONFIG = TextEncoderConfig(vocab_size=64, dim=32, dim_attn=48, dim_ffn=80, num_heads=4, num_layers=2,
                           text_len=160)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "t5.safetensors")


@pytest.fixture(scope="module")
def encoder(golden) -> UMT5Encoder:
    module = UMT5Encoder(CONFIG)
    module.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if "weights." in k})
    return module.requires_grad_(False)


def text_encoder(module: UMT5Encoder, tokenizer: Tokenizer, identity: str = "these weights") -> TextEncoder:
    return TextEncoder(module.config, tokenizer, identity, lambda keep_on: (module, {"kind": "test"}))


@pytest.fixture
def bytes_encoder() -> TextEncoder:
    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=259, text_len=24)
    return text_encoder(UMT5Encoder(config).requires_grad_(False), load_tokenizer("bytes", 24))


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return (a - b).abs().max().item()


def test_hidden_states_match_upstream(encoder, golden):
    """A 1/sqrt(D) scale, a bias shared by the layers or a bucket off by one would show."""
    assert max_error(encoder(golden["ids"], golden["mask"]), golden["hidden"]) <= TOLERANCE


def test_prompt_embeds_match_upstream(encoder, golden):
    """Rows after the end token must be zero, and only those."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(golden["ids"], golden["mask"])]
    tokenizer = replace(load_tokenizer("bytes", 160), vocab_size=64, to_ids=lambda text: rows[int(text)])
    out = text_encoder(encoder, tokenizer).encode(["0", "1", "2"])
    assert max_error(out, golden["prompt_embeds"]) <= TOLERANCE


def test_position_bias_and_buckets_match_upstream(encoder, golden):
    """key - query and query - key mixed up would mirror the table."""
    distance = torch.arange(-300, 301)
    assert torch.equal(distance_bucket(distance, 32, 128), golden["bucket_of_distance"].long())
    positions = torch.arange(48)
    buckets = distance_bucket(positions - positions[:, None], 32, 128)
    assert max_error(encoder.blocks[0].pos_embedding(buckets), golden["pos_bias_block0"]) <= TOLERANCE


def test_padding_has_no_influence(encoder, golden):
    """An ids value in the padding must not reach the rows of the prompt."""
    ids, mask = golden["ids"][:1], golden["mask"][:1]
    changed = torch.where(mask == 0, 5, ids)
    length = int(mask.sum())
    assert torch.equal(encoder(ids, mask)[:, :length], encoder(changed, mask)[:, :length])


def test_bfloat16_stays_close(encoder, golden):
    """A softmax or a norm computed in bf16 would lose more than rounding does."""
    half = UMT5Encoder(CONFIG).bfloat16()
    half.load_state_dict(encoder.state_dict())
    out = half(golden["ids"], golden["mask"])
    assert out.dtype == torch.bfloat16
    rows = golden["mask"].bool()
    error = (out.float() - golden["hidden"])[rows].norm() / golden["hidden"][rows].norm()
    assert error < 0.03


def test_full_size_inventory():
    """A name or shape that differs from the official file would make the real checkpoint unloadable."""
    with torch.device("meta"):
        module = UMT5Encoder(MODELS["longlive-1.3b"].text)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "keys_umt5.json").read_text())
    assert len(shapes) == 242
    assert sum(p.numel() for p in module.parameters()) == 5_680_910_336


@pytest.mark.parametrize("dirty, expected", [
    ("  two\n\t words ", "two words"),
    ("fish &amp;amp; chips", "fish & chips"),
    ("a\u00a0b", "a b"),
    ("cafÃ©", "café"),
    ("\ud800", "\ufffd"),
    ("", ""),
])
def test_cleaning(dirty, expected):
    """One unescape too few, or broken Unicode kept, gives other tokens than the model was trained on."""
    assert clean(dirty) == expected


def test_byte_tokenizer():
    """The stand-in must follow ByT5's ids, end and pad like the real one, and say that it is a stand-in."""
    tokenizer = load_tokenizer("bytes", 6)
    ids, mask = tokenizer(["ab", "", "é"])
    assert ids.tolist() == [[100, 101, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [198, 172, 1, 0, 0, 0]]
    assert mask.sum(1).tolist() == [3, 1, 3]
    assert "stand-in" in tokenizer.kind


def test_long_prompt_is_cut_with_a_warning(caplog):
    """Cutting must keep the end token, and must not be silent."""
    ids, mask = load_tokenizer("bytes", 5)(["x" * 10_000])
    assert ids.tolist() == [[123, 123, 123, 123, 1]] and mask.all()
    assert "from 10001 to 5 tokens" in caplog.text


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tiny folder in the real format: Unigram pieces and a template that appends the end token."""
    from tokenizers import Tokenizer as TokenizerFile
    from tokenizers import models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁red", -1.0), ("▁fox", -1.5), ("▁", -3.0)]
    file = TokenizerFile(models.Unigram(pieces, unk_id=2))
    file.pre_tokenizer = pre_tokenizers.Metaspace()
    file.add_special_tokens(["<pad>", "</s>", "<unk>"])
    file.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    file.enable_truncation(3)  # what a stored file may carry must not decide for us
    file.enable_padding(length=4)
    folder = tmp_path_factory.mktemp("tokenizer")
    file.save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizer_folder(tokenizer_folder):
    """Padding or truncation stored in the file must not override text_len; a typed `<pad>` is no padding."""
    tokenizer = load_tokenizer(tokenizer_folder, 8)
    ids, mask = tokenizer([" red  fox ", "red red red red red red red red red", "red<pad>fox"])
    assert ids[0].tolist() == [3, 4, 1, 0, 0, 0, 0, 0]
    assert ids[1].tolist() == [3] * 7 + [1]
    assert mask[2].sum() == 4 and ids[2, 1] == 0


def test_tokenizer_folder_errors(tmp_path, tokenizer_folder):
    """Each broken folder gives one sentence with a remedy."""
    with pytest.raises(UserError, match="fetch DIR --what text"):
        load_tokenizer(tmp_path / "absent", 8)
    (tmp_path / "tokenizer.json").write_text("<html>")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path, 8)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no T5 tokenizer"):
        load_tokenizer(tmp_path, 8)


def test_encode_is_independent_of_company(bytes_encoder):
    """A prompt cache is only lossless if a prompt encodes to the same bits alone and in a list."""
    both = bytes_encoder.encode(["a red fox", "snow"])
    assert both.shape == (2, 24, 32)
    assert torch.equal(both[1:], bytes_encoder.encode(["snow"]))
    assert not both[1, 5:].any() and both[1, :5].any(dim=-1).all()


@pytest.mark.parametrize("prompts", ["one string", [], [None]])
def test_encode_refuses_what_is_no_list_of_texts(bytes_encoder, prompts):
    """A bare string is a sequence of letters to Python: it would be encoded letter by letter."""
    with pytest.raises(UserError, match="prompts"):
        bytes_encoder.encode(prompts)


def test_tokenizer_must_fit_the_encoder():
    """Ids beyond the table end in a device-side assertion on CUDA, far from the cause."""
    with pytest.raises(UserError, match="259 tokens, but the encoder has only 64"):
        text_encoder(UMT5Encoder(CONFIG), load_tokenizer("bytes", 8))


def test_fingerprint_follows_tokenizer_weights_and_config():
    """A cache keyed by it must miss after any of the three changes."""
    tokenizer, module = load_tokenizer("bytes", 24), None
    config = replace(CONFIG, vocab_size=259)
    others = [(config, tokenizer, "weights"), (config, replace(tokenizer, fingerprint="other"), "weights"),
              (config, replace(tokenizer, text_len=12), "weights"), (config, tokenizer, "other weights"),
              (replace(config, max_distance=64), tokenizer, "weights")]
    prints = [TextEncoder(*key, lambda keep_on: (module, {})).fingerprint for key in (*others, others[0])]
    assert len(set(prints)) == 5 and prints[0] == prints[-1]


def test_encoder_is_loaded_when_it_is_needed():
    """Fingerprint and description must not cost 11 GB of weights."""
    asked = []
    module = UMT5Encoder(replace(CONFIG, vocab_size=259)).requires_grad_(False)

    def load(keep_on):
        asked.append(keep_on)
        return module, {"seconds": 1.0}

    encoder = TextEncoder(module.config, load_tokenizer("bytes", 24), "weights", load)
    assert encoder.fingerprint and encoder.report == {"loaded": False} and not asked
    encoder.encode(["a", "b"])
    encoder.encode(["c"])
    assert asked == [None] and encoder.report == {"loaded": True, "seconds": 1.0}
    hosted = encoder.hosted(lambda module: module)
    hosted.encode(["a"])
    assert asked == [None, "cpu"] and hosted.fingerprint == encoder.fingerprint

