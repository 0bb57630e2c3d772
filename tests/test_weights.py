"""Weights: official layouts, the LoRA merge, damaged and hostile files, random values."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.models import weight_files, weights
from longlive_opt.models.attention import make_attention
from longlive_opt.models.checkpoint import Checkpoint, Header, open_checkpoint
from longlive_opt.models.dit import CausalDiT
from longlive_opt.models.specs import MODELS, DiTConfig, TextEncoderConfig, VAEConfig
from longlive_opt.models.text import UMT5Encoder
from longlive_opt.models.vae import WanVAE
from longlive_opt.models.weight_files import (
    TINY_WEIGHTS,
    WeightFiles,
    check_weights,
    resolve_weights,
    safetensors_header,
)
from longlive_opt.models.weights import (
    attention_norm,
    fill_,
    load_dit,
    load_vae,
    open_lora,
    open_text_encoder,
    random_init_,
)
from longlive_opt.streaming.kv_cache import CacheGeometry, RollingKVCache
from longlive_opt.streaming.sampler import EagerForward, Sampler, SamplingPlan

GOLDEN = Path(__file__).parent / "golden"
DIT = DiTConfig(dim=24, num_heads=2, num_layers=2, ffn_dim=40, freq_dim=16, text_dim=20, text_len=6)
VAE = VAEConfig(dim=6)
TEXT = TextEncoderConfig(vocab_size=259, dim=16, dim_attn=24, dim_ffn=20, num_heads=2, num_layers=1,
                         text_len=6)
RANK, ALPHA = 4, 8.0
LONGLIVE = MODELS["longlive-1.3b"]


def check(config: ExperimentConfig) -> None:
    check_weights(config.weights, config.model_config())


def random_state(module: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    random_init_(module, seed, "cpu", torch.float32)
    return module.state_dict()


def lora_state(linears: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, weight in linears.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        state[f"{prefix}A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
        state[f"{prefix}B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator)
    return state


@pytest.fixture(scope="module")
def dit_state() -> dict[str, Tensor]:
    return random_state(CausalDiT(DIT))


@pytest.fixture(scope="module")
def adapter(dit_state) -> dict[str, Tensor]:
    return lora_state({k: v for k, v in dit_state.items() if k.startswith("blocks.") and v.dim() == 2})


@pytest.fixture
def folder(tmp_path, dit_state, adapter) -> Path:
    """A small weights folder in the formats of the official one, averaged weights and an old pickle too."""
    from tokenizers import Tokenizer, models, processors

    def averaged(name: str) -> str:
        return "model._fsdp_wrapped_module." + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.")

    wan = tmp_path / "Wan2.1-T2V-1.3B"
    (wan / "google" / "umt5-xxl").mkdir(parents=True)
    torch.save({"generator": {f"model.{k}": v for k, v in dit_state.items()},
                "generator_ema": {averaged(k): -v for k, v in dit_state.items()}, "step": 700},
               tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": adapter, "critic_lora": {"x": torch.ones(1)}, "step": 3000},
               tmp_path / "lora.pt")
    torch.save(OrderedDict(random_state(WanVAE(VAE))), wan / "Wan2.1_VAE.pth",
               _use_new_zipfile_serialization=False)
    torch.save({k: v.bfloat16() for k, v in random_state(UMT5Encoder(TEXT)).items()},
               wan / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=2))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(wan / "google" / "umt5-xxl" / "tokenizer.json"))
    return tmp_path


def merged(weight: Tensor, adapter: dict[str, Tensor], name: str) -> Tensor:
    prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{prefix}A.weight" not in adapter:
        return weight
    return weight + ALPHA / RANK * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]


def test_official_folder_loads(folder, dit_state, adapter):
    """Container key, wrapper prefix, PEFT names, old pickle: each could make the real files unloadable."""
    files = resolve_weights(folder, LONGLIVE)
    dit, report = load_dit(DIT, files, "cpu", torch.float32, lora_alpha=ALPHA)
    for name, tensor in dit.state_dict().items():
        torch.testing.assert_close(tensor, merged(dit_state[name], adapter, name), rtol=1e-6, atol=1e-6)
    assert (report["kind"], report["lora_targets"], report["lora_ranks"]) == ("files", 20, [RANK])
    assert report["files"]["lora"] == {"name": "lora.pt", "bytes": (folder / "lora.pt").stat().st_size}
    assert not dit.training and not any(parameter.requires_grad for parameter in dit.parameters())

    vae, _ = load_vae(VAE, files, "cpu", torch.bfloat16)
    expected = random_state(WanVAE(VAE))
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in vae.state_dict().items())

    text = open_text_encoder(TEXT, files, "cpu", torch.bfloat16)
    assert text.encode(["aa"]).shape == (1, 6, 16)
    assert (text.tokenizer.kind, text.report["tensors"]) == ("umt5-xxl", 12)
    assert set(files.sha256()) == {"dit", "lora", "vae", "text"}


def test_text_encoder_is_told_apart_by_its_file(folder):
    """A prompt that one checkpoint encoded would be served to another."""
    def identity(dtype):
        return open_text_encoder(TEXT, resolve_weights(folder, LONGLIVE), "cpu", dtype).fingerprint

    first = identity(torch.bfloat16)
    assert first == identity(torch.bfloat16) != identity(torch.float32)
    path = resolve_weights(folder, LONGLIVE).text
    state = torch.load(path, weights_only=True)
    state["norm.weight"][0] += 1
    torch.save(state, path)
    assert identity(torch.bfloat16) != first


def test_lora_is_rounded_once(folder, dit_state, adapter):
    """Adding an already rounded product to an already rounded weight loses a bit of most weights."""
    dit, _ = load_dit(DIT, resolve_weights(folder, LONGLIVE), "cpu", torch.bfloat16, lora_alpha=ALPHA)
    name = "blocks.1.ffn.0.weight"
    exact = merged(dit_state[name].double(), {k: v.double() for k, v in adapter.items()}, name)
    assert (dit.state_dict()[name] == exact.bfloat16()).float().mean() > 0.999


def test_lora_merge_matches_upstream(tmp_path):
    """A transposed product or alpha in place of alpha/rank would show (golden: rank 4, alpha 8)."""
    golden = load_file(GOLDEN / "lora_merge.safetensors")
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Module()])
    module.blocks[0].self_attn = nn.Module()
    module.blocks[0].self_attn.q = nn.Linear(96, 96, bias=False)
    save_file({k: v for k, v in golden.items() if "lora" in k}, tmp_path / "lora.safetensors")
    lora = open_lora(tmp_path / "lora.safetensors", module, 8)
    error = (lora.merge("blocks.0.self_attn.q.weight", golden["weight"]) - golden["merged"]).abs().max()
    assert error <= 1e-6


def test_averaged_weights(folder, dit_state):
    """Self-Forcing runs with the averaged weights: FSDP's prefix may be anywhere in their names, plain
    weights must not pass for them, and no adapter is needed.
    """
    model = MODELS["self-forcing-1.3b"]
    (folder / "checkpoints").mkdir()
    stored = (folder / "longlive_base.pt").rename(folder / "checkpoints" / "self_forcing_dmd.pt")
    files = resolve_weights(folder, model)
    dit, report = load_dit(DIT, files, "cpu", torch.float32)
    assert all(torch.equal(tensor, -dit_state[name]) for name, tensor in dit.state_dict().items())
    assert report["lora_targets"] == 0 and files.lora is None
    torch.save(dit_state, stored)
    with pytest.raises(UserError, match="expected the key 'generator_ema'"):
        load_dit(DIT, files, "cpu", torch.float32)
    save_file(dit_state, stored.with_suffix(".safetensors"))
    with pytest.raises(UserError, match="no key generator_ema"):
        load_dit(DIT, resolve_weights(folder, model, ("dit",)), "cpu", torch.float32)


@pytest.mark.parametrize("key", ["model", None])
def test_other_containers(folder, dit_state, key):
    """The plain script also accepts the key `model`; a flat file is what other tools write."""
    torch.save({key: dit_state} if key else dit_state, folder / "longlive_base.pt")
    dit, _ = load_dit(DIT, resolve_weights(folder, LONGLIVE, ("dit",)), "cpu", torch.float32)
    assert torch.equal(dit.state_dict()["head.modulation"], dit_state["head.modulation"])


def test_safetensors_equal_pickles(folder, dit_state, adapter):
    """Both formats must go through the same names and the same merge."""
    from_pickle, _ = load_dit(DIT, resolve_weights(folder, LONGLIVE), "cpu", torch.bfloat16, lora_alpha=ALPHA)
    save_file({f"model.{k}": v for k, v in dit_state.items()}, folder / "longlive_base.safetensors")
    save_file(adapter, folder / "lora.safetensors")
    files = resolve_weights(folder, LONGLIVE)
    assert files.dit.suffix == files.lora.suffix == ".safetensors"
    both, _ = load_dit(DIT, files, "cpu", torch.bfloat16, lora_alpha=ALPHA)
    for name, tensor in both.state_dict().items():
        assert torch.equal(tensor, from_pickle.state_dict()[name])


def test_longlive_folders_are_found(folder):
    """Whoever has run LongLive has 20 GB in its layout and should not fetch them again."""
    (folder / "longlive_models" / "models").mkdir(parents=True)
    (folder / "wan_models").mkdir()
    for name in ("longlive_base.pt", "lora.pt"):
        (folder / name).rename(folder / "longlive_models" / "models" / name)
    (folder / "Wan2.1-T2V-1.3B").rename(folder / "wan_models" / "Wan2.1-T2V-1.3B")
    assert resolve_weights(folder, LONGLIVE).dit == folder / "longlive_models" / "models" / "longlive_base.pt"


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.full_size])
def test_full_size_names_match(tmp_path, name):
    """The published inventory of the transformer, under the key that the model's file keeps it."""
    model = MODELS[name]
    with torch.device("meta"):
        dit = CausalDiT(model.dit)
    keys = json.loads((GOLDEN / "keys_dit.json").read_text())
    stored = {f"model.{key}": torch.zeros(1).expand(shape) for key, shape in keys.items()}
    torch.save({model.checkpoint.containers[0]: stored}, tmp_path / "base.pt")
    headers = open_checkpoint(tmp_path / "base.pt", model.checkpoint.containers).headers
    expected = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert {name: header.shape for name, header in headers.items()} == expected


def test_full_size_adapter_matches(tmp_path):
    """Of LongLive's 300 targets each has to find its weight."""
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig())
    keys = json.loads((GOLDEN / "keys_lora.json").read_text())
    torch.save({"generator_lora": {key: torch.zeros(1).expand(shape) for key, shape in keys.items()}},
               tmp_path / "lora.pt")
    targets = open_lora(tmp_path / "lora.pt", dit, 256).targets
    assert len(targets) == 300 and {rank for _, _, rank in targets.values()} == {256}


def test_another_model_on_the_projects_weights_is_told_where_its_own_come_from():
    """'git checkout weights/tiny' for somebody who asked for Self-Forcing and left the folder as it was."""
    with pytest.raises(UserError, match="name the folder of self-forcing-1.3b's weights, such as one that "
                                        "'.* --model self-forcing-1.3b' filled"):
        check_weights(TINY_WEIGHTS, MODELS["self-forcing-1.3b"])


def test_every_misfit_is_named_before_anything_is_read(dit_state):
    """One error for all problems, from the headers alone: 17 GB are not read to find a missing bias."""
    headers = {k: Header(tuple(v.shape), "float32") for k, v in dit_state.items()}
    del headers["head.modulation"]
    headers["vace.weight"] = Header((1,), "float32")
    headers["blocks.0.norm3.weight"] = Header((99,), "float32")
    headers["blocks.1.ffn.0.weight"] = Header(headers["blocks.1.ffn.0.weight"].shape, "int8")

    def read(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    with torch.device("meta"):
        module = CausalDiT(DIT)
    with pytest.raises(UserError) as error:
        fill_(module, Checkpoint(Path("base.pt"), headers, read), "cpu", torch.float32)
    for part in ("1 missing: head.modulation", "1 unexpected: vace.weight",
                 "blocks.0.norm3.weight [99] instead of [24]", "blocks.1.ffn.0.weight (int8)"):
        assert part in str(error.value)


def test_long_lists_are_cut(folder):
    """Weights of another size would otherwise print hundreds of names."""
    with pytest.raises(UserError, match=r"\d+ missing: .* and \d+ more") as error:
        load_dit(DiTConfig(), resolve_weights(folder, LONGLIVE, ("dit",)), "meta", torch.float32)
    assert len(str(error.value)) < 4000


def test_lora_misfits_are_named(tmp_path, dit_state, adapter):
    """Half an adapter, or one of another model, must not be merged as far as it goes."""
    broken = dict(adapter)
    del broken["base_model.model.blocks.0.ffn.0.lora_B.weight"]
    broken["base_model.model.blocks.9.ffn.0.lora_A.weight"] = torch.zeros(4, 24)
    broken["base_model.model.blocks.9.ffn.0.lora_B.weight"] = torch.zeros(40, 4)
    broken["base_model.model.blocks.0.ffn.2.lora_A.weight"] = torch.zeros(4, 41)
    broken["blocks.0.ffn.2.alpha"] = torch.tensor(4.0)
    torch.save(broken, tmp_path / "lora.pt")
    with pytest.raises(UserError) as error:
        open_lora(tmp_path / "lora.pt", CausalDiT(DIT), ALPHA)
    for part in ("not LoRA tensors: blocks.0.ffn.2.alpha",
                 "other half: base_model.model.blocks.0.ffn.0.lora_A.weight",
                 "model lacks: blocks.9.ffn.0.weight",
                 "blocks.0.ffn.2.weight [24, 40] with A [4, 41] and B [24, 4]"):
        assert part in str(error.value)


def test_nan_is_named(folder, dit_state):
    """One bad value otherwise shows as a black video."""
    dit_state = {k: v.clone() for k, v in dit_state.items()}
    dit_state["blocks.1.cross_attn.k.bias"][3] = float("nan")
    dit_state["head.head.weight"][0, 0] = 3.4e38  # finite in float32, not in bfloat16
    torch.save({"generator": dit_state}, folder / "longlive_base.pt")
    with pytest.raises(UserError, match="NaN or infinity in blocks.1.cross_attn.k.bias, head.head.weight"):
        load_dit(DIT, resolve_weights(folder, LONGLIVE, ("dit",)), "cpu", torch.bfloat16)


@pytest.mark.parametrize("base, half, scale, words", [
    (False, True, 1, ["lora.pt: NaN or infinity in base_model.model.blocks.0.ffn.0.lora_B.weight"]),
    (True, False, 1, ["base.pt: NaN or infinity in blocks.0.ffn.0.weight; "]),
    (True, True, 1, ["base.pt: NaN or infinity in blocks.0.ffn.0.weight; ", "lora.pt: NaN or infinity in "]),
    (False, False, 1e30, ["lora.pt: merged with lora_alpha 8, it makes infinity in ", "smaller lora_alpha"]),
])
def test_nan_is_blamed_on_the_file_that_has_it(folder, dit_state, adapter, base, half, scale, words):
    """The base fetched again, 5.7 GB, for a value that is in the adapter."""
    dit_state, adapter = ({k: v.clone() for k, v in state.items()} for state in (dit_state, adapter))
    adapter = {name: scale * tensor for name, tensor in adapter.items()}
    if base:
        dit_state["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    if half:
        adapter["base_model.model.blocks.0.ffn.0.lora_B.weight"][1, 1] = float("inf")
    torch.save({"generator": dit_state}, folder / "longlive_base.pt")
    torch.save({"generator_lora": adapter}, folder / "lora.pt")
    with pytest.raises(UserError) as error:
        load_dit(DIT, resolve_weights(folder, LONGLIVE), "cpu", torch.float32, lora_alpha=ALPHA)
    assert all(part in str(error.value) for part in words)
    assert ("base.pt" in str(error.value)) == base


def test_a_rank_or_an_alpha_that_cannot_be(tmp_path, dit_state, adapter):
    """ZeroDivisionError and RuntimeError of torch, which name neither file nor key."""
    module = CausalDiT(DIT)
    empty = {name: half[:0] if "lora_A" in name else half[:, :0] for name, half in adapter.items()}
    torch.save(empty, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="lora.pt: .* 20 of rank 0: blocks.0.self_attn.q.weight"):
        open_lora(tmp_path / "lora.pt", module, ALPHA)
    torch.save(adapter, tmp_path / "lora.pt")
    for alpha in (1e300, float("nan"), 0.0):
        with pytest.raises(UserError, match="lora_alpha: .* at most 1e"):
            open_lora(tmp_path / "lora.pt", module, alpha)


STRANGE_TENSORS = {
    "meta": lambda tensor: tensor.to("meta"), "sparse": Tensor.to_sparse, "csr": Tensor.to_sparse_csr,
    "nested": lambda tensor: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # torch says that some of these are prototypes
@pytest.mark.parametrize("kind", STRANGE_TENSORS)
@pytest.mark.parametrize("name", ["longlive_base.pt", "lora.pt"])
def test_tensors_without_plain_values_are_named(folder, dit_state, adapter, kind, name):
    """NotImplementedError or RuntimeError of torch, for a tensor of the right name and shape."""
    state = dict(dit_state if name == "longlive_base.pt" else adapter)
    tensor = next(key for key, value in state.items() if value.dim() == 2)
    state[tensor] = STRANGE_TENSORS[kind](state[tensor])
    key = "generator" if name == "longlive_base.pt" else "generator_lora"
    torch.save({key: state}, folder / name)
    with pytest.raises(UserError, match=f"{name}: does not fit the model; .*{tensor} "):
        load_dit(DIT, resolve_weights(folder, LONGLIVE), "cpu", torch.float32, lora_alpha=ALPHA)


@pytest.mark.parametrize("old", [True, False], ids=["old format", "zip"])
def test_a_torch_file_cut_or_changed_anywhere_is_refused(tmp_path, dit_state, old):
    """struct.error of an old file, BadZipFile of a new one, with no file's name."""
    path, whole = tmp_path / "longlive_base.pt", _saved(dit_state, old)
    for length in range(1, min(60_000, len(whole)), 499):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="longlive_base.pt"):
            open_checkpoint(path)
    end = bytearray(whole)
    for place in range(len(end) - 22, len(end)):  # the record that ends a zip file
        changed = bytes(end[:place]) + bytes([end[place] ^ 0x55]) + bytes(end[place + 1:])
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            open_checkpoint(path)


@pytest.mark.parametrize("header", [
    '{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}}',
    '{"patch_embedding.weight": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
    '{"__metadata__": ' + '{"a":' * 5000 + "1" + "}" * 5000 +
    ', "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "[1]"],
    ids=["number", "text", "dtype", "brackets", "metadata", "list"])
def test_a_strange_header_is_refused(tmp_path, header):
    """TypeError or RecursionError for a header that is JSON and not safetensors'."""
    path = tmp_path / "longlive_base.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(UserError, match="longlive_base.safetensors:? .*damaged"):
        open_checkpoint(path)
    with pytest.raises(UserError, match=f"{tmp_path}"):
        check_weights(tmp_path, MODELS["tiny"])


def test_a_prefix_too_much_is_named(tmp_path, dit_state):
    """825 names missing and 825 unexpected, where one word before each is all that is wrong."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in dit_state.items()}
    torch.save(state | {"vae.x": torch.ones(1)}, tmp_path / "base.pt")
    with pytest.raises(UserError, match="base.pt: its names fit the model but for the prefix "
                                        "'diffusion_model.'; .* without it"):
        fill_(CausalDiT(DIT), open_checkpoint(tmp_path / "base.pt"), "cpu", torch.float32)
    del state["model.diffusion_model.head.modulation"]
    torch.save(state, tmp_path / "base.pt")
    with pytest.raises(UserError, match="missing"):
        fill_(CausalDiT(DIT), open_checkpoint(tmp_path / "base.pt"), "cpu", torch.float32)


@pytest.mark.parametrize("place", ["", "models"])
def test_shards_are_told_how_to_join(folder, dit_state, place):
    """'lacks longlive_base.pt' and 20 GB to fetch, for a folder that holds it in parts."""
    (folder / "longlive_base.pt").unlink()
    (folder / place).mkdir(exist_ok=True)
    names = list(dit_state)
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: dit_state[name] for name in part},
                  folder / place / f"model-{number:05}-of-00002.safetensors")
    with pytest.raises(UserError, match=r"lacks longlive_base.pt; it holds shards \(model-00001-of-00002"):
        resolve_weights(folder, LONGLIVE)
    (folder / place / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"shards \(model.safetensors.index.json\), .*: join") as error:
        resolve_weights(folder, LONGLIVE)
    code = str(error.value).split('python -c "')[1].split('", with')[0].replace("NAME", "longlive_base")
    subprocess.run([sys.executable, "-c", code], cwd=folder / place, check=True)
    joined, _ = load_dit(DIT, resolve_weights(folder, LONGLIVE, ("dit",)), "cpu", torch.float32)
    assert torch.equal(joined.state_dict()["head.modulation"], dit_state["head.modulation"])


def test_weights_are_no_view_of_the_file(folder, dit_state):
    """A file replaced or cut while a notebook runs must not change the model (or kill the process)."""
    dit, _ = load_dit(DIT, resolve_weights(folder, LONGLIVE, ("dit",)), "cpu", torch.float32)
    with open(folder / "longlive_base.pt", "r+b") as file:
        file.write(bytes((folder / "longlive_base.pt").stat().st_size))
    assert all(torch.equal(tensor, dit_state[name]) for name, tensor in dit.state_dict().items())


class _Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def _saved(content: object, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


ONES = torch.ones(99)
BAD_FILES = {
    "empty": (lambda mark: b"", "is empty"),
    "lfs": (lambda mark: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "html": (lambda mark: b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "text": (lambda mark: b"weights", "not a torch file"),
    "cut": (lambda mark: _saved({"generator": {"a": ONES}})[:-200], "cut short"),
    "cut old": (lambda mark: _saved({"a": ONES}, old=True)[:-200], "cut short"),
    "bare pickle": (lambda mark: pickle.dumps({"a": 1}, 2), "not a torch file"),
    "hostile": (lambda mark: _saved({"generator": {"a": _Hostile(mark)}}), "posix.system"),
    "hostile old": (lambda mark: _saved(_Hostile(mark), old=True), "posix.system"),
    "hostile pickle": (lambda mark: pickle.dumps(_Hostile(mark), 2), "posix.system"),
    "foreign class": (lambda mark: _saved({"a": ONES, "args": argparse.Namespace()}), "argparse.Namespace"),
    "wrong key": (lambda mark: _saved({"critic": {"a": ONES}, "step": 1}), "the keys 'critic', 'step'"),
    "no dictionary": (lambda mark: _saved([ONES]), "type list"),
    "nothing": (lambda mark: _saved({}), r"keys \(none\)"),
    "same name twice": (lambda mark: _saved({"a": ONES, "model.a": ONES}), "one tensor"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_torch_files(tmp_path, monkeypatch, case):
    """One sentence each, never torch's own advice; nothing hostile runs, whatever the environment says."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    make, expected = BAD_FILES[case]
    path = tmp_path / "longlive_base.pt"
    path.write_bytes(make(tmp_path / "executed"))
    with pytest.raises(UserError, match=expected) as error:
        open_checkpoint(path, ("generator", "model", None))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content, expected", [
    (b"", "is empty"),
    (b"<html>", "web page"),
    (b"version https://git-lfs", "git-lfs"),
    (b"weights", "damaged"),
    (None, "damaged, cut short"),
])
def test_bad_safetensors(tmp_path, content, expected):
    """The same classes of damage in the other format."""
    path = tmp_path / "x.safetensors"
    if content is None:
        save_file({"a": torch.ones(99)}, path)
        content = path.read_bytes()[:-20]
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    """A path that is a folder, or nothing, is the commonest mistake of all."""
    with pytest.raises(UserError, match="does not exist; run '.*fetch DIR"):
        open_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="is a folder"):
        open_checkpoint(tmp_path)


def test_resolve_names_everything_that_is_missing(folder):
    """Being told of one missing file per attempt costs an attempt per file."""
    (folder / "lora.pt").unlink()
    (folder / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(UserError, match="lacks lora.pt, Wan2.1-T2V-1.3B/Wan2.1_VAE.pth; run '.*fetch /"):
        resolve_weights(folder, LONGLIVE)
    with pytest.raises(UserError, match="neither 'random' nor a folder"):
        resolve_weights("randon", LONGLIVE)
    assert resolve_weights("random", LONGLIVE) == WeightFiles() and WeightFiles().kind == "random"


def test_header_and_length_tell_a_whole_file(tmp_path):
    """A download that was cut short, found after 13 s in a notebook of each preset."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(99), "b": torch.ones(2, 3)}, path, metadata={"format": "pt"})
    content = path.read_bytes()
    header = safetensors_header(path)
    assert {name: tensor["shape"] for name, tensor in header.items()} == {"a": [99], "b": [2, 3]}
    scrambled = content[:9] + b"!" + content[10:]
    for damaged in (content[:-1], content + b"0", content[:20], content[:4], scrambled):
        path.write_bytes(damaged)
        assert safetensors_header(path) is None


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A copy of the weights that come with the project, in their place."""
    monkeypatch.setattr(weight_files, "project_path", lambda path: tmp_path / path)
    return Path(shutil.copytree(Path(__file__).parents[1] / TINY_WEIGHTS, tmp_path / TINY_WEIGHTS))


@pytest.mark.parametrize("name", ["longlive_base.safetensors", "Wan2.1-T2V-1.3B/Wan2.1_VAE.safetensors",
                                  "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json"])
def test_tiny_weights_are_restored_by_git(tiny, name):
    """20 GB of official files fetched on top of the tiny model, for a file that git has."""
    check(ExperimentConfig())
    (tiny / name).write_bytes((tiny / name).read_bytes()[:-9] if name.endswith("s") else b"")
    with pytest.raises(UserError, match=f"weights: .*{name} is .*; run 'git checkout weights/tiny'"):
        check(ExperimentConfig())
    (tiny / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*; run 'git checkout weights/tiny'"):
        check(ExperimentConfig())
    shutil.rmtree(tiny)
    with pytest.raises(UserError, match="nor a folder.*git checkout weights/tiny"):
        check(ExperimentConfig())


@pytest.mark.parametrize("inside", ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B/google/umt5-xxl", "training",
                                    "absent", "longlive_base.safetensors"])
def test_folder_inside_the_weights_folder_names_its_parent(tiny, tmp_path, inside):
    """One level too deep: "run 'git checkout'" where git has nothing to bring, or 20 GB fetched into it."""
    copy = shutil.copytree(tiny, tmp_path / "copy")
    for folder in (tiny, copy):
        with pytest.raises(UserError, match=f"weights: '{folder / inside}' .*; name its parent, {folder}.$"):
            check(ExperimentConfig(weights=str(folder / inside)))
    (copy / "longlive_base.safetensors").unlink()
    with pytest.raises(UserError, match=f"; name its parent, {copy}.$"):
        check(ExperimentConfig(weights=str(copy / inside)))


def test_folder_inside_longlives_folders_names_the_whole_one(folder):
    """`longlive_models` holds two files of five, and is not what is to be named."""
    (folder / "longlive_models" / "models").mkdir(parents=True)
    for name in ("longlive_base.pt", "lora.pt"):
        (folder / name).rename(folder / "longlive_models" / "models" / name)
    with pytest.raises(UserError, match=f"; name its parent, {folder}.$"):
        resolve_weights(folder / "longlive_models" / "models", LONGLIVE)


@pytest.mark.parametrize("name", ["longlive_base.safetensors", "Wan2.1-T2V-1.3B/Wan2.1_VAE.safetensors",
                                  "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json"])
def test_copy_of_the_tiny_weights_is_restored_by_copying(tiny, tmp_path, name):
    """20 GB of official files fetched beside the tiny model's, which they do not fit."""
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = ExperimentConfig(weights=str(copy))
    check(config)
    (copy / name).write_bytes((copy / name).read_bytes()[:-9] if name.endswith("s") else b"")
    with pytest.raises(UserError, match=f"{name} is .*; copy it again from .* weights/tiny.$"):
        check(config)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*; copy it again from .* weights/tiny.$"):
        check(config)


def test_weights_of_another_model_are_refused():
    """A list of 825 shapes that do not fit, and neither `model` nor `weights` in it."""
    with pytest.raises(UserError, match="weights: 'weights/tiny' .* model: 'longlive-1.3b' .*use"):
        check(ExperimentConfig(model="longlive-1.3b"))
    check(ExperimentConfig(model="longlive-1.3b", weights="random"))


def test_random_weights_depend_on_seed_and_name_only():
    """Were all tensors drawn from one stream, one more layer would change every weight after it."""
    first, report = load_dit(DIT, WeightFiles(), "cpu", torch.float32, seed=1)
    again, _ = load_dit(DIT, WeightFiles(), "cpu", torch.float32, seed=1)
    other, _ = load_dit(DIT, WeightFiles(), "cpu", torch.float32, seed=2)
    deeper, _ = load_dit(replace(DIT, num_layers=3), WeightFiles(), "cpu", torch.float32, seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, deeper.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
    assert (report["kind"], report["seed"], report["files"]) == ("random", 1, {})


def test_random_weights_are_one_model_in_every_dtype(monkeypatch):
    """Values drawn in bfloat16, or in other pieces, make the float32 model another one: nothing could be
    called the truth of the other."""
    wide, _ = load_dit(DIT, WeightFiles(), "cpu", torch.float32, seed=1)
    narrow, _ = load_dit(DIT, WeightFiles(), "cpu", torch.bfloat16, seed=1)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor.bfloat16(), narrow.state_dict()[name]), name
    assert wide.head.head.weight.bfloat16().float().ne(wide.head.head.weight).any()
    monkeypatch.setattr(weights, "_DRAWN_AT_ONCE", 100)
    first, second = (random_state(UMT5Encoder(TEXT))["token_embedding.weight"] for _ in range(2))
    assert torch.equal(first, second) and first.std() == pytest.approx(1, rel=0.1)
    assert not torch.equal(first.view(-1)[:100], first.view(-1)[100:200])


@pytest.mark.parametrize("name, mean, std", [
    ("blocks.0.self_attn.q.weight", 0, 192**-0.5), ("blocks.1.self_attn.o.weight", 0, 2 * 192**-0.5),
    ("blocks.0.cross_attn.o.weight", 0, 2 * 192**-0.5), ("blocks.0.self_attn.o.bias", 0, 0.02),
    ("time_projection.1.weight", 0, 0.4 * 192**-0.5), ("time_embedding.2.weight", 0, 192**-0.5),
    ("blocks.0.cross_attn.norm_k.weight", 1.593, 0.1593), ("blocks.1.self_attn.norm_q.weight", 1.593, 0.1593),
    ("blocks.0.norm3.weight", 1, 0.1), ("blocks.0.norm3.bias", 0, 0.02), ("head.modulation", 0, 0.1),
    ("patch_embedding.weight", 0, 0.125), ("blocks.0.ffn.2.weight", 0, 256**-0.5)])
def test_random_scales_of_the_transformer(name, mean, std):
    """Attention that is uniform, or whose output is lost beside the residual stream, hides what a preset
    breaks in it."""
    found = random_state(CausalDiT(replace(DIT, dim=192, num_heads=4, ffn_dim=256)))[name]
    assert found.mean() == pytest.approx(mean, abs=4 * std * found.numel()**-0.5)
    assert found.std() == pytest.approx(std, rel=0.15)


def test_random_modulation_opens_the_gates():
    """Gates around 0 switch both branches of a block off: the picture is noise that all presets share."""
    rows = random_state(CausalDiT(replace(DIT, dim=192, num_heads=4)))["blocks.1.modulation"][0]
    for row, (mean, std) in zip(rows, [(0, 0.1), (0, 0.1), (0.25, 0.05)] * 2, strict=True):
        assert (row.mean().item(), row.std().item()) == (pytest.approx(mean, abs=0.03),
                                                         pytest.approx(std, rel=0.2))


@pytest.mark.parametrize("module, name, mean, std", [
    (WanVAE(VAE), "decoder.middle.0.residual.6.weight", 0, 0.5 * (27 * 24)**-0.5),
    (WanVAE(VAE), "decoder.middle.0.residual.2.weight", 0, (27 * 24)**-0.5),
    (WanVAE(VAE), "decoder.middle.1.proj.weight", 0, 0.5 * 24**-0.5),
    (WanVAE(VAE), "decoder.head.2.weight", 0, 0.7 * (27 * 6)**-0.5),
    (WanVAE(VAE), "encoder.head.2.weight", 0, (27 * 24)**-0.5),
    (WanVAE(VAE), "decoder.middle.1.norm.gamma", 1, 0.1),
    (UMT5Encoder(TEXT), "token_embedding.weight", 0, 1), (UMT5Encoder(TEXT), "blocks.0.norm1.weight", 1, 0.1),
    (UMT5Encoder(TEXT), "blocks.0.pos_embedding.embedding.weight", 0, 0.5),
    (UMT5Encoder(TEXT), "blocks.0.attn.q.weight", 0, (16 * 12)**-0.5),
    (UMT5Encoder(TEXT), "blocks.0.attn.k.weight", 0, 16**-0.5)])
def test_random_scales_around_the_transformer(module, name, mean, std):
    """Norms near 0 or linears near 1 would silence a network or blow it up."""
    found = random_state(module)[name]
    assert found.mean() == pytest.approx(mean, abs=5 * std * found.numel()**-0.5)
    assert found.std() == pytest.approx(std, rel=0.4)


def test_norms_of_queries_and_keys_follow_the_window():
    """With one constant a small picture's attention would look at a single key, a large one's at all."""
    assert attention_norm(18_720) == pytest.approx(1.593, abs=5e-4)
    assert attention_norm(768) == pytest.approx(1.341, abs=1e-3)
    assert attention_norm(12) == attention_norm(1) == 1  # 30 e and less
    assert MODELS["longlive-1.3b"].window_tokens == 18_720
    assert MODELS["tiny"].with_size(64, 64).window_tokens == 192
    norms = [load_dit(DIT, WeightFiles(), "cpu", torch.float32, window_tokens=tokens)[0]
             .blocks[0].self_attn.norm_q.weight for tokens in (12, 18_720)]
    assert norms[1].mean() / norms[0].mean() == pytest.approx(1.593, abs=0.01)


@torch.no_grad()
def test_random_weights_are_demanding(one_thread):
    """With weights that are all drawn alike a stream without recache was as near as one in bfloat16, and no
    gate could tell them apart."""
    config = DiTConfig(dim=128, num_heads=2, num_layers=6, ffn_dim=512, freq_dim=32, text_dim=32, text_len=32)
    rows, frames, device = 4, 12, torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 1, 24, 32, generator=generator)
    noisy, other_first, *past = torch.randn(6, 1, 3, 16, 2 * rows, 2 * rows, generator=generator)

    def flow(past, prompts, dtype=torch.float32):
        """Of the block after a full window; `prompts`: of the past, and of the block."""
        dit, _ = load_dit(config, WeightFiles(), device, dtype, window_tokens=frames * rows * rows)
        geometry = CacheGeometry(config.num_layers, config.num_heads, config.head_dim, rows, rows, frames, 3)
        cache = RollingKVCache(geometry, make_attention("cpu"), 1, device, dtype)
        sampler = Sampler(SamplingPlan(), EagerForward(dit))
        texts = [dit.embed_text(prompt.to(dtype)) for prompt in prompts]
        for i, latents in enumerate(past):
            sampler.run_pass(cache, texts[0], 3 * i, latents.to(dtype), 0, keys_only=True)
        return sampler.run_pass(cache, texts[1], 3 * len(past), noisy.to(dtype), 937.5).float()

    truth = flow(past, (new, new))

    def error(found):
        return ((found - truth).norm() / truth.norm()).item()

    rounding = error(flow(past, (new, new), torch.bfloat16))
    assert truth.square().mean().sqrt() == pytest.approx(1.1, abs=0.3)
    assert error(flow(past, (old, old))) > 0.4
    assert error(flow(past, (old, new))) > 10 * rounding  # no recache
    assert error(flow([other_first, *past[1:]], (new, new))) > 5 * rounding  # another sink
    assert 0.002 < rounding < 0.02


def test_random_text_encoder_uses_the_stand_in():
    """Random weights need no file at all, and the result must say which tokenizer was used."""
    text = open_text_encoder(TEXT, WeightFiles(), "cpu", torch.bfloat16)
    out = text.encode(["fox", "snow"])
    assert out.dtype == torch.bfloat16 and out.isfinite().all() and not torch.equal(out[0], out[1])
    assert "stand-in" in text.description["tokenizer"]


def test_buffers_outside_the_checkpoint_are_refused():
    """A table built in a constructor stays on the meta device and would fail far away, at its first use."""
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.arange(3), persistent=False)
    with pytest.raises(RuntimeError, match="buffers table"):
        random_init_(module, 0, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_loads_the_same_values(folder):
    """A merge on the GPU that runs in TF32 would be off by 1e-3."""
    files = resolve_weights(folder, LONGLIVE)
    gpu, _ = load_dit(DIT, files, "cuda", torch.float32, lora_alpha=ALPHA)
    cpu, _ = load_dit(DIT, files, "cpu", torch.float32, lora_alpha=ALPHA)
    for name, tensor in gpu.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), cpu.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("source", ["random", "file"])
def test_cuda_holds_one_copy(tmp_path, source):
    """At 5.7 billion parameters a second copy, or one in float32, is what no longer fits."""
    with torch.device("meta"):
        module = UMT5Encoder(replace(TEXT, dim=512, dim_attn=512, dim_ffn=1280, num_heads=8, num_layers=8))
    size = 2 * sum(parameter.numel() for parameter in module.parameters())
    if source == "file":
        ones = {name: torch.ones(tensor.shape).bfloat16() for name, tensor in module.state_dict().items()}
        torch.save(ones, tmp_path / "t5.pth")
    gc.collect()  # what an earlier test left would be counted, and given back meanwhile
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if source == "file":
        fill_(module, open_checkpoint(tmp_path / "t5.pth"), "cuda", torch.bfloat16)
    else:
        random_init_(module, 0, "cuda", torch.bfloat16)
    assert size <= torch.cuda.max_memory_allocated() - before < 1.2 * size


def test_weights_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    """20 GB read by every preset of a campaign, or the digest of what lay there before."""
    store, read = tmp_path / "kept.json", []
    monkeypatch.setattr(weight_files, "KEPT_FROM_BYTES", 4)
    monkeypatch.setattr(weight_files, "DIGESTS_FILE", str(store))
    monkeypatch.setattr(weight_files, "file_sha256", lambda path: read.append(path.name) or path.read_text())
    path = tmp_path / "dit.pt"
    path.write_text("first")
    files = WeightFiles(tmp_path, dit=path)
    for _ in range(2):
        assert files.sha256() == {"dit": "first"}
        weight_files._read_sha256.cache_clear()  # as another process would find it
    assert read == ["dit.pt"] and list(json.loads(store.read_text())) == [str(path)]
    path.write_text("other")  # of the same size
    assert files.sha256() == {"dit": "other"} and read == ["dit.pt"] * 2
    store.write_text("[")
    weight_files._read_sha256.cache_clear()
    assert files.sha256() == {"dit": "other"} and len(read) == 3
