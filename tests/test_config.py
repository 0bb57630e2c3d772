"""The door of the library: what a preset may say, and what every refusal tells."""

from __future__ import annotations

import datetime
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longlive_opt.config import KEYS, RUN_KEYS, SWITCHES, ExperimentConfig, keys_of, notebook_parameters
from longlive_opt.errors import UserError
from longlive_opt.files import load_yaml, project_path
from longlive_opt.measurement import decision
from longlive_opt.models.specs import MODELS

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "params").glob("*.yaml"))
PROFILES = sorted((ROOT / "params" / "profiles").glob("*.yaml"))


def refusal(mapping: object) -> str:
    with pytest.raises(UserError) as error:
        ExperimentConfig.from_mapping(mapping)  # type: ignore[arg-type]
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("key, value, says", [
    ("model", "big", "longlive-1.3b"), ("model_dtype", "float16", "bfloat16"),
    ("compile_mode", "fast", "max-autotune"),
    ("kv_quantization", "int4", "fp8"), ("kv_read_path", "copy", "fused"),
    ("attention_backend", "flash3", "cudnn"),
    ("objective", "speed", "latency"), ("device", "gpu", "cuda:N"), ("name", "a/b", "letters"),
    ("name", "", "letters"),
    ("height", 100, "try 96"), ("height", -16, "try 16"), ("width", 8, "try 16"),
    ("denoising_steps", [], "at least one"), ("denoising_steps", [1000, 1000], "fall strictly"),
    ("denoising_steps", [250, 500], "fall strictly"), ("denoising_steps", [1001], "1..1000"),
    ("denoising_steps", [500, 0], "1..1000"), ("block_frames", 0, "at least 1"),
    ("sink_size", -1, "at least 0"),
    ("context_noise", 1000, "at most 999"), ("context_noise", -1, "at least 0"),
    ("local_attn_size", -1, "21"), ("local_attn_size", 5, "at least 6"), ("seed", -1, "at least 0"),
    ("video_latent_frames", 0, "at least 1"),
    ("warmup_blocks", 3, "at least 4"), ("measure_blocks", 1, "at least 2"),
    ("num_switches", -1, "at least 0"),
    ("playback_fps", 0, "greater than 0"), ("target_ms_per_frame", -1.0, "greater than 0"),
    ("lora_alpha", 0, "greater than 0"), ("timestep_shift", 0.0, "greater than 0"),
    ("measure_blocks", 400, "relative_rope"), ("prompts", [], "at least one prompt"),
    ("prompts", ["a", " "], "write some"),
    ("switch_frame_indices", [3, 6, 9], "3 prompts need 2"),
    ("switch_frame_indices", [-3, 3], "not negative"),
    ("switch_frame_indices", [3, 18], "video_latent_frames"),
    ("video_latent_frames", 10, "use 9 or 12"),
    ("max_error_ratio", -5, "greater than 0"), ("linear_layers", ["head"], "at least one of qkv"),
    ("linear_quantization", "int4", "int8, fp8"), ("fidelity_blocks", 1, "at least 2"),
    ("use_fused_kernels", True, "use_static_kv or use_quantized_kv"),
    ("use_torch_compile", True, "use_static_kv or use_quantized_kv"),
    ("use_quantized_linears", True, "switch on use_fused_kernels"),
    ("attention_backend", "cudnn", "use auto"), ("attention_backend", "flash", "use auto"),
    ("attention_backend", "efficient", "use auto"),
])
def test_refused_value_names_key_value_and_remedy(key, value, says):
    """A value that fails minutes later, inside torch, or that is taken and means something else."""
    message = refusal({key: value})
    assert message.startswith(f"{key}:") and says in message
    assert isinstance(value, (list, bool)) or str(value) in message


@pytest.mark.parametrize("key, value, says", [
    ("seed", "1", "expected int"), ("seed", True, "expected int"), ("seed", 1.0, "expected int"),
    ("seed", None, "write a value of type int"), ("playback_fps", True, "expected float"),
    ("playback_fps", float("nan"), "finite"), ("max_error_ratio", float("inf"), "finite"),
    ("use_static_kv", 1, "expected bool"),
    ("use_static_kv", "true", "expected bool"), ("title", 5, "expected str"), ("title", False, "quotes"),
    ("prompts", "one prompt", "is not a list"), ("prompts", {"a": "b"}, "is not a list"),
    ("prompts", 3, "is not a list"),
    ("prompts", ["a", 2], "prompts[1]"), ("prompts", ["a", None], "prompts[1]"),
    ("prompts", ["no", False], "quotes"),
    ("denoising_steps", ["1e3"], "denoising_steps[0]"), ("denoising_steps", 1000, "is not a list"),
    ("switch_frame_indices", "6;7", "is not a list"), ("switch_frame_indices", True, "is not a list"),
    ("prompts", {"a"}, "is not a list"), ("denoising_steps", b"hi", "is not a list"),
    ("seed", 10**30, "too large"),
    ("prompts_file", "a\0", "a control character"), ("title", "\x1b]0;x\x07", "a control character"),
    ("name", "n" * 101, "up to 100 letters"), ("timestep_shift", 1e308, "too large"),
    ("playback_fps", 1e-320, "too small"), ("lora_alpha", 1e300, "too large"),
    ("height", 1600000000, "too large"),
])
def test_wrong_type_is_refused(key, value, says):
    """Python would take True for 1, "1" for a path and a text for a list of letters."""
    message = refusal({key: value})
    assert message.startswith(key) and says in message


@pytest.mark.parametrize("key, value, remedy", [
    ("seed", "abc", "write a whole number, such as 4"), ("seed", "1e2", "write 100"),
    ("seed", "4", "write 4"), ("seed", "08", "write 8"), ("seed", "-1.5e1", "write -15"),
    ("seed", "1e-3", "write a whole number"), ("seed", "1e30", "write a whole number"),
    ("seed", 4.0, "write 4"), ("seed", 4.5, "write a whole number"),
    ("seed", float("inf"), "write a whole number, such as 4"),
    ("seed", True, "write a whole number, such as 4"), ("seed", [4], "write a whole number, such as 4"),
    ("denoising_steps", [1000.0], "write 1000"),
    ("playback_fps", "1e-3", "YAML reads 1e-3 as text: write 1.0e-3"),
    ("playback_fps", "1.5e1", "YAML reads 1.5e1 as text: write 1.5e+1"),
    ("playback_fps", "1.0e+1", "write 1.0e+1 without quotes"),
    ("playback_fps", "2.5", "write 2.5 without quotes"),
    ("playback_fps", "08", "YAML reads 08 as text: write 08.0"),
    ("playback_fps", "fast", "write a number, such as 2.5"),
    ("playback_fps", "nan", "write a number, such as 2.5"),
    ("playback_fps", True, "write a number, such as 2.5"),
    ("use_static_kv", "yes", "write true or false"), ("title", 5, "put quotes around it"),
])
def test_wrong_type_tells_what_to_write(key, value, remedy):
    """`seed: abc` answered with "write 1.0e-3"."""
    assert refusal({key: value}).endswith(f"; {remedy}.")


@pytest.mark.parametrize("key, text", [
    ("video_crf", "4.0"), ("video_crf", "'4'"), ("video_crf", "08"), ("video_crf", "1.5e1"),
    ("playback_fps", "1e-3"), ("playback_fps", "1e2"), ("playback_fps", "'25'"), ("playback_fps", "08"),
    ("playback_fps", "1.5e1"), ("playback_fps", "'1.0e-3'"), ("playback_fps", "1.e1"),
])
def test_number_that_is_advised_is_taken(key, text):
    """Advice that, when followed, is refused again, or is another number: YAML takes 1.5e1 for text, too."""
    advised = refusal({key: yaml.safe_load(text)}).removesuffix(".").rpartition("write ")[2]
    config = ExperimentConfig.from_mapping({key: yaml.safe_load(advised.removesuffix(" without quotes"))})
    assert getattr(config, key) == float(text.strip("'"))


@pytest.mark.parametrize("value", ["6, 12", "6,12", [6, 12], (6, 12)])
def test_switch_frames_are_written_as_in_a_line_of_jsonl(value):
    """LongLive's own form, which a prompt file takes, refused in a preset."""
    assert ExperimentConfig.from_mapping({"switch_frame_indices": value}).switch_frame_indices == (6, 12)
    one = {"prompts": ["a", "b"], "switch_frame_indices": 6}
    assert ExperimentConfig.from_mapping(one).switch_frame_indices == (6,)


def test_a_list_given_as_text_is_told_how_papermill_takes_one():
    """`-p prompts '[a, b]'`, which papermill hands on as a text."""
    with pytest.raises(UserError, match=r"papermill: -y 'prompts: \[a, b\]', or a file with -f"):
        ExperimentConfig.from_mapping({"prompts": "[a, b]"})


def test_integers_are_floats_where_floats_are_meant():
    """`playback_fps: 25` is what people write."""
    assert ExperimentConfig.from_mapping({"playback_fps": 30}).playback_fps == 30.0
    assert isinstance(ExperimentConfig.from_mapping({"max_error_ratio": 2}).max_error_ratio, float)


def test_unknown_key_suggests_the_right_one():
    """A misspelt flag that is ignored makes a run without the optimization that it is named after."""
    assert "did you mean 'use_static_kv'" in refusal({"use_static_kw": True})
    message = refusal({"qqq": 1, "sed": 2})
    assert "'qqq'" in message and "did you mean 'seed'" in message
    assert "unknown key '1'" in refusal({1: 2})


@pytest.mark.parametrize("mapping", [None, [], "seed: 1", 3])
def test_no_mapping_is_refused(mapping):
    """An empty YAML file is None."""
    assert "expected keys and values" in refusal(mapping)


@pytest.mark.parametrize("key, value", [
    ("vae_chunk_latents", 0), ("gpu_memory_limit_gb", 0.0), ("playback_fps", 1001), ("prompt_cache_mb", -1),
    ("height", 0), ("width", 0), ("device", "cuda:x"), ("device", "cuda:-1"), ("device", "cuda:"),
    ("name", ".."),
    ("name", "."), ("seed", 2**64), ("video_crf", -5),
    ("playback_fps", 10**400), ("video_crf", 99), ("video_width", 0), ("video_width", -64),
], ids=lambda part: str(part)[:24])
def test_value_at_the_edge_is_refused_at_the_door(key, value):
    """0 pixels taken for "the model's own size", a folder called "..", a seed that torch cannot take."""
    assert refusal({key: value}).startswith(f"{key}:")


def test_defaults_and_round_trip():
    """A tuple that comes back as a list, a key that is forgotten: a stored preset would not build again."""
    config = ExperimentConfig.from_mapping({})
    assert config == ExperimentConfig()
    other = ExperimentConfig.from_mapping({
        "name": "x", "denoising_steps": [900, 100], "prompts": ["a", "b", "c"],
        "switch_frame_indices": [1, 2],
        "height": 64, "width": 32, "max_error_ratio": 0.5, "relative_rope": True, "prompt_cache_dir": "d"})
    for one in (config, other):
        stored = json.loads(json.dumps(one.to_dict()))
        assert ExperimentConfig.from_mapping(stored) == one
        assert ExperimentConfig.from_mapping(yaml.safe_load(yaml.safe_dump(stored))) == one
    assert list(config.to_dict())[:3] == ["name", "title", "hypothesis"]


def test_limits_that_depend_on_other_keys():
    """A limit of the default window or block that stays when these change."""
    assert "at least 8" in refusal({"local_attn_size": 7, "sink_size": 4, "block_frames": 4})
    assert "block_frames 4; use 16 or 20" in refusal({"block_frames": 4})
    assert "at least 12" in refusal({"block_frames": 1, "sink_size": 1, "warmup_blocks": 11})
    small = ExperimentConfig.from_mapping({"block_frames": 1, "sink_size": 0, "local_attn_size": 1,
                                           "warmup_blocks": 1})
    assert (small.window_blocks, small.max_blocks) == (1, 1024)
    endless = ExperimentConfig.from_mapping({"relative_rope": True, "measure_blocks": 5000})
    assert endless.max_blocks is None
    assert ExperimentConfig.from_mapping({}).max_blocks == 341
    assert ExperimentConfig.from_mapping({"video_latent_frames": 1023}).video_blocks == 341


@pytest.mark.parametrize("key, value, blocks", [
    ("measure_blocks", 1000, 1005), ("num_switches", 1000, 2005), ("num_switches", 169, 343),
    ("warmup_blocks", 1000, 1004), ("video_latent_frames", 1026, 342)])
def test_stream_that_is_too_long_names_what_makes_it_so(key, value, blocks):
    """1000 switches, and "measure_blocks: 4 is too many; measure fewer"."""
    message = refusal({key: value})
    assert message.startswith(f"{key}: {value} makes a stream of {blocks} blocks")
    assert "end after 341" in message and "relative_rope" in message
    ExperimentConfig.from_mapping({key: value, "relative_rope": True})


@pytest.mark.parametrize("keys", [
    {"warmup_blocks": 4, "measure_blocks": 337, "use_async_vae": True},
    {"warmup_blocks": 338, "measure_blocks": 2}], ids=["behind the last", "rehearsal"])
def test_blocks_that_are_not_measured_must_fit_too(keys):
    """A run that dies in its last block, past the last rotary position."""
    assert "a stream of 342 blocks" in refusal(keys)


@pytest.mark.parametrize("key, keys", [
    ("attention_backend", {"attention_backend": "flash"}),
    ("attention_backend", {"attention_backend": "cudnn"}),
    ("kv_read_path", {"use_quantized_kv": True}),
    ("use_quantized_linears",
     {"use_static_kv": True, "use_fused_kernels": True, "use_quantized_linears": True}),
])
def test_half_precision_kernels_are_refused_in_float32(key, keys):
    """PyTorch's own message says "No available kernel" and no more; Triton's is an assertion."""
    float32 = {"device": "cuda", "model_dtype": "float32"}
    assert refusal(keys | float32).startswith(f"{key}:")
    ExperimentConfig.from_mapping(keys | float32 | {"model_dtype": "bfloat16"})
    ExperimentConfig.from_mapping(float32 | {"attention_backend": "efficient", "use_quantized_kv": True,
                                             "kv_read_path": "dequantize"})


def test_model_sizes():
    """1560 tokens per latent frame is the number behind every measurement."""
    full, tiny = MODELS["longlive-1.3b"], MODELS["tiny"]
    assert (full.latent_height, full.latent_width, full.tokens_per_frame) == (60, 104, 1560)
    assert full.dit.head_dim == 128
    assert tiny.dit.text_dim == tiny.text.dim and tiny.dit.text_len == tiny.text.text_len
    assert full.with_size(64, None).height == 64
    assert full.with_size(64, None).width == 832


@pytest.mark.parametrize("text, says", [
    ("", "found nothing"), ("# only a comment\n", "found nothing"), ("- a\n- b\n", "found list"),
    ("just text\n", "found str"),
    ("seed: 1\nseed: 2\n", "'seed' occurs twice"), ("a: {b: 1, b: 2}\n", "'b' occurs twice"),
    ("seed: [1\n", "not plain YAML"), ("seed:\t1\n\t- x: 2", "not plain YAML"),
    ("seed: 1\n---\nseed: 2\n", "not plain YAML"),
    ("seed: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
    ("seed: !!python/tuple [1]\n", "not plain YAML"),
    ("prompts: &a [x]\n<<: *b\n", "not plain YAML"), ("title: \x07\n", "not plain YAML"),
])
def test_yaml_that_is_no_flat_mapping(tmp_path, text, says):
    """An empty file, two values for one key, code in a tag: YAML lets most of them pass."""
    with pytest.raises(UserError) as error:
        load_yaml(write(tmp_path / "preset.yaml", text))
    message = str(error.value)
    assert says in message and "preset.yaml" in message and "\n" not in message


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{a: 1}: 2\n", "? {a: 1}\n: 2\n"])
def test_yaml_key_that_is_a_list_or_mapping(tmp_path, text):
    """An unhashable key is a TypeError inside the search for repeated keys."""
    with pytest.raises(UserError, match="yaml( line 1)?: a key must be a plain word"):
        load_yaml(write(tmp_path / "preset.yaml", text))


def test_yaml_file_that_cannot_be_read(tmp_path):
    """A path typed wrong, a folder, a file in another encoding."""
    with pytest.raises(UserError, match="No such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="directory"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"title: caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize("line, says", [
    ("playback_fps: 1e-3", "write 1.0e-3"), ("title: no", "quotes"),
    ("use_static_kv: 'yes'", "expected bool"),
    ("seed: 08", "expected int"), ("seed:", "write a value"), ("prompts: a fox", "is not a list"),
    ("denoising_steps: [1000, 0.5]", "denoising_steps[1]"),
])
def test_yaml_traps_are_refused_with_their_remedy(tmp_path, line, says):
    """YAML 1.1 reads 1e-3 as text and bare `no` as false."""
    assert says in refusal(load_yaml(write(tmp_path / "preset.yaml", line + "\n")))


@pytest.mark.parametrize("line, says", [
    ("seed: 0123", "YAML reads 0123 as 83: write 83 or 123"), ("seed: 0x1f", "as 31: write 31"),
    ("seed: 0b1", "as 1: write 1"), ("seed: 1_000", "as 1000: write 1000"), ("seed: 1:30", "as 90: write 90"),
    ("playback_fps: 1:30.5", "not a decimal number"), ("playback_fps: 1_0.5", "not a decimal number"),
    ("name: 2026-01-31", "as a timestamp; put quotes"), ("title: 2026-99-99", "as a timestamp; put quotes"),
    ("seed: " + "9" * 5000, "too long"), ("seed: !!int x", "the tag 'tag:yaml.org,2002:int'; leave it out"),
    ("prompts: !!set {a, b}", "the tag"), ("denoising_steps: !!binary aGk=", "the tag"),
    ("title: &a b", "an alias"), ("title: *a", "an alias"), ("prompts: " + "[" * 3000, "too many levels"),
    ("prompts: " + "[" * 60 + "]" * 60, "too many levels"), ("title: =", "as a value"),
    ("title: \"a\\e[31m\"", "a control character"), ("seed: 1e", "expected int"),
])
def test_yaml_decides_nothing_silently(tmp_path, line, says):
    """A value that YAML turns into another one, or that Python's YAML cannot build: a traceback."""
    with pytest.raises(UserError) as caught:
        ExperimentConfig.from_mapping(load_yaml(write(tmp_path / "preset.yaml", line + "\n")))
    assert says in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_shipped_preset_is_valid_with_every_profile(preset):
    """A preset that cannot run, or whose name is not the file's: outputs would land in another folder."""
    own = load_yaml(preset)
    config = ExperimentConfig.from_mapping(own)
    assert config.name == preset.stem
    assert own.get("title") and (own.get("hypothesis") or preset.stem == "smoke")
    for profile in PROFILES:
        merged = ExperimentConfig.from_mapping(own | load_yaml(profile))
        assert merged.name == config.name and merged.device in ("cpu", "cuda")


def test_a_hypothesis_says_when_and_knowing_what_it_was_written():
    """A prediction that was made after the runs it predicts, and reads as if it came before them."""
    dated = re.compile(r"(\d{4}-\d{2}-\d{2}), knowing [^:]{10,}: \S")
    for path in PRESETS:
        if text := load_yaml(path).get("hypothesis", ""):
            found = dated.match(text)
            assert found and datetime.date.fromisoformat(found[1]), \
                f"{path.name}: say when, and what was known"


@pytest.mark.parametrize("mapping, where", [({"title": "\ud83e"}, "title"),
                                            ({"prompts": ["a", "b \udd8a"]}, "prompts[1]")])
def test_half_a_character_is_refused_by_key(mapping, where):
    """An hour's measurement lost, since neither result.json nor failed.json can hold the prompt."""
    with pytest.raises(UserError, match="half of a character") as error:
        ExperimentConfig.from_mapping(mapping)
    assert str(error.value).startswith(f"{where}: ") and str(error.value).encode()
    assert ExperimentConfig.from_mapping({"title": "\ud83e\udd8a"}).title == "\U0001f98a"


def test_half_a_character_in_a_file_is_refused_with_its_line(tmp_path):
    """A message that names the key and leaves one to look for it in two files."""
    path = tmp_path / "p.yaml"
    path.write_text('name: mine\nprompts:\n- "a"\n- "fox \\ud83e"\n')
    with pytest.raises(UserError, match=r"p\.yaml line 2, prompts\[1\]: 'fox \\ud83e' holds"):
        load_yaml(path)
    path.write_text('name: mine\ntitle: "\\ud83e\\udd8a"\n')
    assert load_yaml(path)["title"] == "\U0001f98a"


def test_prompts_of_a_file_stand_alone():
    """Three default prompts in a result, beside the file that was used instead of them."""
    assert ExperimentConfig.from_mapping({"prompts_file": "p.txt"}).to_dict()["prompts"] == []
    assert ExperimentConfig.from_mapping({"prompts_file": None}).prompts == ExperimentConfig().prompts


def test_a_notebook_has_variables_of_its_own_and_typed_parameters_are_refused():
    """A loop before the first cell breaks the run; a Path in the parameters cell runs the default instead."""
    cells = ["", "for i in range(3): pass", "import math\nx = 1", "seed = 3\nsede = 4",
             "# Parameters\nrun = 2"]
    own = {"In": cells, "i": 2, "x": 1, "_y": 1, "math": math, "seed": 3, "sede": 4, "run": 2}
    assert notebook_parameters(own) == {"seed": 3, "sede": 4, "run": 2}
    assert notebook_parameters({"seed": 3, "x": 1}) == {"seed": 3, "x": 1}
    for name, value in (("weights", Path("w")), ("prompts", {"a"}), ("seed", 1j), ("prompts", [Path("a")])):
        with pytest.raises(UserError, match=f"{name}: a .* is not a plain value"):
            notebook_parameters({name: value})


@pytest.mark.parametrize(("keys", "words"), [
    ({"seed": "a"}, "seed: 'a' is of type str"), ({"height": "32"}, "height: '32' is of type str"),
    ({"device": 5}, "device: 5 is of type int"), ({"gpus": True}, "gpus: True is of type bool"),
    ({"use_static_kv": 1}, "use_static_kv: 1 is of type int"), ({"prompts": "a"}, "prompts: 'a' is not"),
    ({"weights": Path("w")}, "weights: .* is of type PosixPath")], ids=str)
def test_a_config_made_in_python_is_checked_like_a_file(keys, words):
    """A text for a number that is compared with one, minutes later; a 1 that means true in one place only."""
    with pytest.raises(UserError, match=words):
        ExperimentConfig(**keys).validate()


def test_every_path_is_read_in_one_way(tmp_path, monkeypatch):
    """A folder called `~`, or one below whatever folder the notebook was started in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert project_path("~/a") == tmp_path / "a" and project_path("a") == ROOT / "a"
    with pytest.raises(UserError, match="this is no path"):
        project_path("~nobody-here/a")
    with pytest.raises(UserError, match="this is no path"):
        project_path("a" * 300)
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    assert load_yaml(Path("~/a.yaml")) == {"seed": 1}


def test_profiles_leave_the_experiment_alone():
    """A profile names machine and model, and prompts that this model understands; a flag or a sampling value
    in it would change what is compared.
    """
    assert {"laptop", "h100"} <= {path.stem for path in PROFILES}
    experiment = {*keys_of("identity"), *keys_of("sampling")}
    for profile in PROFILES:
        keys = load_yaml(profile).keys()
        assert not experiment & keys and not keys & {*SWITCHES}


def test_the_catalogue_is_whole_and_its_defaults_are_allowed():
    """A key without its words, one with bounds that its own default breaks, a group of one misspelt name, or
    a switch under another group, which the log and the check of the baseline would overlook.
    """
    groups = list(dict.fromkeys(entry.group for entry in KEYS.values()))
    assert groups == ["identity", "model and machine", "sampling", "optimizations", "prompts and video",
                      "measurement"]
    assert [name for group in groups for name in keys_of(group)] == list(KEYS), "groups are contiguous"
    for name, entry in KEYS.items():
        assert entry.doc and len(entry.comment) <= 90 and not entry.doc.endswith("."), name
        entry.check(name, getattr(ExperimentConfig, name))
    assert {name for name in KEYS if name.startswith("use_")} | {"vae_offload_ahead"} == {*SWITCHES}
    assert not KEYS.keys() & RUN_KEYS.keys()
    assert {*keys_of("sampling"), "model_dtype"} == {*decision._SAME_KEYS}, "what makes runs comparable"


def test_importing_the_config_needs_no_torch():
    """`longlive_opt.config` must refuse a preset at once; torch takes seconds."""
    code = ("import sys, longlive_opt.config, longlive_opt.prompts, longlive_opt.errors; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_window_sink_and_steps_come_with_the_model(name: str) -> None:
    """Self-Forcing with LongLive's window and sink: another model's behaviour, without a word."""
    spec = MODELS[name]
    config = ExperimentConfig.from_mapping({"model": name})
    assert (config.local_attn_size, config.sink_size, config.denoising_steps) == (
        spec.window, spec.sink, spec.steps)
    assert config.warmup_blocks == config.window_blocks + 1
    own = ExperimentConfig.from_mapping({"model": name, "local_attn_size": 9, "sink_size": 0})
    assert (own.local_attn_size, own.sink_size) == (9, 0)
