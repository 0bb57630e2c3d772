"""The roofline: counted work against PyTorch's counter and by hand, kernels by kind, floors, the notebook."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch
from micro import micro_config, micro_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.measurement import ceilings as ceilings_module
from longlive_opt.measurement.block_trace import BlockTrace, Kernel
from longlive_opt.measurement.ceilings import Ceiling, measure_ceilings
from longlive_opt.measurement.roofline import Roofline, kind_of, kind_rows, own_times, stages_of
from longlive_opt.measurement.work import block_work
from longlive_opt.models.attention import make_attention
from longlive_opt.models.dit import CausalDiT, TextContext
from longlive_opt.models.vae import WanVAE
from longlive_opt.report.charts import waterfall
from longlive_opt.report.charts.floors import (
    distance_to_floor,
    kernels_against_floor,
    speed_against_intensity,
)
from longlive_opt.streaming.kv_cache import RollingKVCache
from longlive_opt.streaming.pipeline import cache_geometry
from longlive_opt.streaming.sampler import EagerForward
from longlive_opt.streaming.timeline import Event

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def micro():
    with micro_model():
        yield


def total(work, kind: str, stage: str = "denoise") -> float:
    return sum(one.count * one.flops for one in work if one.kind == kind and one.stage == stage)


def test_work_of_the_full_size_by_hand():
    """A layer forgotten or counted twice: the floor would be wrong and look right."""
    config = ExperimentConfig(model="longlive-1.3b", weights="random", vae_chunk_latents=3)
    work = block_work(config, keys_only=True)
    tokens, keys, dim = 3 * 30 * 52, 12 * 30 * 52, 1536
    layer = 6 * dim * dim + 2 * dim * 8960  # q, k, v, o; cross-attention's q and o; feed-forward
    ends = 2 * 64 * dim  # patches in and out
    assert total(work, "linear") == 4 * 2 * tokens * (30 * layer + ends)
    assert total(work, "self-attention") == 4 * 30 * 4 * tokens * keys * dim
    assert total(work, "cross-attention") == 4 * 30 * 4 * tokens * 512 * dim
    # The clean pass lacks all of the last layer but q, k, v, and the head.
    assert total(work, "linear", "clean_pass") == 2 * tokens * (29 * layer + 3 * dim * dim + 64 * dim)
    assert total(work, "self-attention", "clean_pass") == 29 * 4 * tokens * keys * dim
    large = [one for one in work if one.shape == (96, 96, 12, 480, 832, 3, 3)]
    assert sum(one.count for one in large) == 6
    assert large[0].flops == 2 * 27 * 96 * 96 * 12 * 480 * 832
    assert large[0].bytes == 2 * (96 * 480 * 832 * (12 + 2 + 12) + 27 * 96 * 96)
    joined = next(one for one in work if one.name == "q, k, v")
    assert joined.bytes == 2 * (tokens * dim + dim * 3 * dim + tokens * 3 * dim)
    attention = next(one for one in work if one.kind == "self-attention")
    assert attention.bytes == 2 * (2 * tokens + 2 * keys) * dim
    assert 39e12 < total(work, "convolution", "decode") < 42e12


def test_8_bit_formats_move_fewer_bytes_and_have_their_own_ceilings():
    """A floor of 8-bit attention from bfloat16's kernel."""
    keys = {"use_quantized_kv": True, "use_fused_kernels": True, "use_quantized_linears": True,
            "linear_layers": ("up",)}
    work = block_work(ExperimentConfig(**keys), keys_only=True)
    stored = {(one.name, one.stored) for one in work if one.stored}
    assert stored == {("self-attention", "int8"), ("feed-forward, up", "int8")}
    plain = {one.name: one for one in block_work(ExperimentConfig(), keys_only=True)}
    assert all(one.bytes < plain[one.name].bytes for one in work if one.stored)
    converted = block_work(ExperimentConfig(use_quantized_kv=True, kv_read_path="dequantize"), keys_only=True)
    assert not any(one.stored for one in converted)


@pytest.mark.parametrize("model, chunk", [("tiny", 1), ("tiny", 2), ("longlive-1.3b", 3)])
def test_work_is_what_pytorch_counts(model, chunk):
    """An operator that does not run, or one that is not counted. On the meta device nothing is computed."""
    config = ExperimentConfig(model=model, weights="random", vae_chunk_latents=chunk,
                              denoising_steps=(1000,))
    spec, meta = config.model_config(), torch.device("meta")
    with meta:
        dit, vae = CausalDiT(spec.dit).to(torch.bfloat16), WanVAE(spec.vae).to(torch.bfloat16)
    cache = RollingKVCache(cache_geometry(config, spec), make_attention("cpu"), 1, meta, torch.bfloat16)
    frames = config.block_frames
    latents = torch.empty(1, frames, 16, spec.latent_height, spec.latent_width, device=meta).bfloat16()
    heads = torch.empty(1, spec.dit.text_len, spec.dit.num_heads, spec.dit.head_dim, device=meta).bfloat16()
    text, forward = TextContext(*[(heads,) * spec.dit.num_layers] * 2), EagerForward(dit)

    cache.begin(0, config.local_attn_size)  # the window is full: nothing has to be in it
    cache.end()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _ in range(len(config.denoising_steps) + 1):
            cache.begin(config.local_attn_size, frames)
            forward(latents, 500.0, text, cache)
            cache.end()
        history = vae.init_history(1, spec.latent_height, spec.latent_width, meta, torch.bfloat16)
        for part in latents.transpose(1, 2).split(chunk, dim=2):
            _, history = vae.decode(part, history, False)
    dim, freq = spec.dit.dim, spec.dit.freq_dim  # the reference embeds the timestep in every pass
    embedding = 2 * 2 * frames * dim * (freq + dim + 6 * dim)
    counted = sum(one.count * one.flops for one in block_work(config, keys_only=False))
    assert counter.get_total_flops() == counted + embedding


@pytest.mark.parametrize("name, stage, kind", [
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "denoise", "linear layers"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "clean_pass", "linear layers"),
    ("linear_kernel", "denoise", "linear layers"), ("aten::addmm", "denoise", "linear layers"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6", "denoise", "attention"),
    ("attention_kernel", "denoise", "attention"), ("merge_kernel", "denoise", "attention"),
    ("attention8_kernel", "denoise", "attention"),
    ("qk_norm_rope_write_kernel", "denoise", "norms and the rest"),
    ("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_3", "denoise", "norms and the rest"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc", "decode", "convolutions"),
    ("conv_kernel", "decode", "convolutions"), ("head_kernel", "decode", "convolutions"),
    ("norm_silu_kernel", "decode", "norms and the rest"),
    ("aten::slow_conv3d_forward", "decode", "convolutions"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "decode", "VAE attention"),
    ("Memcpy DtoH (Device -> Pinned)", "copy_to_host", "copies"), ("aten::copy_", "decode", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4>", "denoise", "norms and the rest")])
def test_kernels_have_the_kind_of_their_name(name, stage, kind):
    """A convolution counted as a linear layer, or a kernel of ours that no pattern knows."""
    assert kind_of(name, stage) == kind


def span(name: str, start: float, length: float, block: int = 5) -> Event:
    return Event(name, start, length, block, "host")


def test_kernels_belong_to_the_stage_that_ran_them():
    """Decoding in parallel: every kernel of the next block's passes counted as the VAE's."""
    spans = [span("denoise", 0, 10), span("decode", 5, 10)]
    kernels = [Kernel("a", 1, 1, 7), Kernel("b", 6, 1, 7), Kernel("c", 6, 1, 8), Kernel("d", 12, 1, 8),
               Kernel("e", 30, 1, 8)]
    assert stages_of(kernels, spans) == ["denoise", "denoise", "decode", "decode", ""]


def test_operators_inside_others_are_not_counted_twice():
    """A block of 600 ms with operators of 900."""
    kernels = [Kernel("outer", 0, 10, 1), Kernel("inner", 1, 4, 1), Kernel("innermost", 2, 1, 1),
               Kernel("other", 2, 5, 2), Kernel("next", 11, 2, 1)]
    assert own_times(kernels) == [6, 3, 1, 5, 2]


def test_rows_add_up_to_the_block():
    """Time that no row shows, or a floor of another count."""
    marks = [Event("block_start", 0, 0, 5, "host"), Event("chunk_ready", 100, 0, 5, "host")]
    trace = BlockTrace((5,), None, (*marks, span("denoise", 0, 60), span("decode", 60, 40)), (
        Kernel("nvjet", 1, 30, 1), Kernel("attention_kernel", 40, 10, 1), Kernel("conv_kernel", 61, 25, 1)))
    work = block_work(ExperimentConfig(), keys_only=True)
    ceilings = {one.key: Ceiling("k", 0.25) for one in work if one.kind != "norm"}
    rows = {row.kind: row for row in kind_rows(trace, work, ceilings, 100.0, 100.0)}
    assert sum(row.ms for row in rows.values()) == pytest.approx(100)
    assert [rows[kind].ms for kind in ("linear layers", "attention", "convolutions", "no kernel")] == [
        30, 10, 25, 35]
    calls = Counter()
    for one in work:
        calls[one.kind] += one.count
    assert rows["linear layers"].floor_ms == pytest.approx(calls["linear"] * 0.25)
    moved = sum(one.count * one.bytes for one in work if one.kind == "norm")
    assert rows["norms and the rest"].floor_ms == pytest.approx(moved / 100e6)


def test_the_fastest_kernel_is_the_ceiling(monkeypatch):
    """A floor from a slow kernel: everything would look close to it."""
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(ceilings_module, "_ms", lambda call, device: next(times))
    monkeypatch.setattr(ceilings_module, "_candidates",
                        lambda *_: [(name, lambda: None) for name in ("a", "b", "c")])
    work = [one for one in block_work(ExperimentConfig(), keys_only=True) if one.kind == "self-attention"]
    [ceiling] = measure_ceilings([*work, *work], torch.device("cpu"), torch.float32).values()
    assert ceiling == Ceiling("b", 1.0)


def test_wrong_order_and_unknown_presets_are_refused():
    """An AttributeError where a sentence would name the missing call."""
    study = Roofline(micro_config())
    with pytest.raises(UserError, match=r"pipeline: there is none yet; call build\(\) first"):
        study.measure()
    with pytest.raises(UserError, match=r"call measure\(\) first"):
        study.kernels_table()
    with pytest.raises(UserError, match="preset: 'nonsense' is unknown; choose one of .*realtime"):
        Roofline.from_notebook({"preset": "nonsense"})


def test_notebook_from_ceilings_to_provenance(capsys):
    """A cell that fails; a floor that is held against a campaign of another machine."""
    cells = nbformat.read(ROOT / "notebooks/90_roofline.ipynb", as_version=4).cells
    names: dict[str, object] = {}
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= {"model": "micro", "weights": "random", "height": 32, "width": 32}
    study = names["study"]
    shown = capsys.readouterr().out
    assert "The block takes" in shown and f"torch: {torch.__version__}" in shown and "git_commit: " in shown
    table = study.kinds_table()
    assert {"linear layers", "attention", "convolutions", "norms and the rest"} <= set(table.index)
    assert sum(row.ms for row in study.rows) >= study.block_ms * 0.999 and study.floor_ms > 0
    assert {"copy", "linear", "convolution", "self-attention"} <= set(study.ceilings_table()["kind"])
    assert len(study.kernels_table(3)) == 3
    assert "convolutions" in kernels_against_floor(study.rows).alt
    assert "GB/s" in speed_against_intensity(study.rows, study.points(), study.copy).alt
    results, reason = names["results"], names["reason"]
    assert "H100" in reason and "realtime" in waterfall(results).alt
    alone = distance_to_floor(results, "x", study.block_ms, study.floor_ms, reason).alt
    together = distance_to_floor(results, "x", study.block_ms, study.floor_ms).alt
    assert "baseline" not in alone and "baseline" in together and "x, this run" in alone
    assert study.comparable({"environment": study.facts(), "model": {
        "name": "micro", "sizes": {"height": 32, "width": 32}}}) == ""
