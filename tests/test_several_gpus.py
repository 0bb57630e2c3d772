"""One stream on several ranks: gloo processes with a micro model of 12 heads, compared with one process.

A class has one number of ranks, which start once. Its last test ends them in one of the ways in which they
can end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import micro
import pytest
import torch
from torch import Tensor

from longlive_opt import config
from longlive_opt.config import ExperimentConfig, check_baseline
from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.measurement import protocol
from longlive_opt.models.specs import ModelSpec
from longlive_opt.optimizations import build_pipeline
from longlive_opt.optimizations.several_gpus import rank_device, start_ranks
from longlive_opt.prompts import PromptSchedule
from longlive_opt.ranks.processes import Family, RankFailed
from longlive_opt.streaming.session import StreamingSession

# 12 heads as at full size; 12 tokens per latent frame, and 8 rows of latents: 1 to 4 ranks can share it.
MODEL: ModelSpec = dataclasses.replace(
    micro.MICRO, name="micro12", height=64, width=48,
    dit=dataclasses.replace(micro.MICRO.dit, dim=96, num_heads=12))
# On four ranks, two of them share heads.
FEW_HEADS = dataclasses.replace(MODEL, name="micro6", dit=dataclasses.replace(MODEL.dit, num_heads=6))
# Two passes and a clean one per block of two latent frames; the window holds the sink and two more blocks.
SHORT = {"block_frames": 2, "local_attn_size": 6, "sink_size": 2, "denoising_steps": [1000, 500],
         "vae_chunk_latents": 2}
# 32 tokens per latent frame and 16 rows of latents, which 8 ranks can share.
EIGHT_PARTS = {"height": 128, "width": 64}
FUSED = {"use_static_kv": True, "use_fused_kernels": True}
REALTIME = {"use_quantized_kv": True, "kv_quantization": "fp8", "use_fused_kernels": True,
            "use_quantized_linears": True, "use_early_decode": True, "use_prompt_cache": True,
            "use_fused_vae": True}


@pytest.fixture(scope="module", autouse=True)
def model() -> Iterator[None]:
    """Also lets torch.compile run what it is given on the other ranks, without compiling it."""
    with micro.micro_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "MODELS", MappingProxyType(
            {**config.MODELS, MODEL.name: MODEL, FEW_HEADS.name: FEW_HEADS}))
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


def preset(**keys: Any) -> ExperimentConfig:
    return micro.micro_config(**{"model": MODEL.name, **SHORT, **keys})


@contextlib.contextmanager
def ranks(count: int) -> Iterator[Family]:
    family = start_ranks(preset(gpus=count, **(EIGHT_PARTS if count == 8 else {})))
    pids = list(family.pids.values())
    try:
        yield family
    finally:
        family.close()
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stream(session: StreamingSession, blocks: int = 6) -> tuple[Tensor, Tensor]:
    """Latents and frames of a stream with a switch before the window is full, and one after it has moved."""
    chunks = []
    for chunk in session.stream("a fox", blocks):
        chunks.append((chunk.latents[0].clone(), chunk.frames[0].clone()))
        if chunk.block in (0, 3):
            session.switch_prompt(f"a whale {chunk.block}")
    latents, frames = zip(*chunks)
    return torch.cat(latents), torch.cat(frames).int()


@cache
def alone(**keys: Any) -> tuple[Tensor, Tensor]:
    return stream(StreamingSession(build_pipeline(preset(**keys))))


def check_equal(family: Family, tolerance: float = 1e-5, **keys: Any) -> StreamingSession:
    """Compare with one process; return the session. A frame may differ by a step of uint8, where rounding
    decides.
    """
    one = {key: value for key, value in keys.items() if key not in ("gpus", "vae_ranks", "rank_exchange")}
    latents, frames = alone(**one)
    session = StreamingSession(build_pipeline(preset(gpus=family.size, **keys), family))
    for blocks in (6, 2) if family.size == 2 else (6,):  # the second after a reset
        made, shown = stream(session, blocks)
        latents, frames = latents[:len(made)], frames[:len(shown)]
        error = (made - latents).norm() / latents.norm()
        assert error < tolerance
        assert len(made) == 2 * blocks and len(shown) == 8 * blocks - 3
        different = (shown - frames).abs()
        assert different.max() <= (1 if tolerance < 1e-4 else 8) and (different > 0).float().mean() < 0.01
        session.reset()
    return session


@pytest.fixture(scope="class")
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with ranks(request.cls.RANKS) as family:
        yield family


class TestTwoRanks:
    RANKS = 2

    def test_reference_cache(self, family: Family) -> None:
        """Heads or tokens in the wrong order, a recache with other frames, a stale prompt."""
        session = check_equal(family)
        assert "exchanged by peer memory" in session.pipeline.optimizations[-1]["report"]["done"]

    def test_compiled_halves(self, family: Family, cheap_compile: None) -> None:
        """A rotation before the exchange, by the positions of another rank's tokens."""
        for exchange in ("peer", "collective"):
            check_equal(family, use_static_kv=True, use_torch_compile=True, rank_exchange=exchange)

    def test_everything_of_realtime_and_record(self, family: Family) -> None:
        """Scales of other heads, a norm over part of the heads, a clean pass that only rank 0 skips."""
        session = check_equal(family, 0.02, **REALTIME)
        one = StreamingSession(build_pipeline(preset(**REALTIME)))
        assert session.cache.nbytes == one.cache.nbytes // 2

    def test_a_quantized_vae_in_bands(self, family: Family) -> None:
        """History of a band in bf16, or without its halo. Another order of sums tips 8-bit numbers over."""
        eight = {**FUSED, "use_fused_vae": True, "use_quantized_vae": True}
        pipeline = build_pipeline(preset(gpus=2, **eight), family)
        ours, twin, plain = (made.make_vae_decoder() for made in (
            pipeline, build_pipeline(preset(**eight)), build_pipeline(preset(**FUSED, use_fused_vae=True))))
        for _ in range(3):
            latents = torch.randn(1, 2, *pipeline.latent_shape)
            found, expected, exact = (decoder.push(latents)[0] for decoder in (ours, twin, plain))
            assert (found - expected).norm() < 0.4 * (expected - exact).norm()

    def test_a_second_job_is_refused(self, family: Family) -> None:
        """A second pipeline would take over the ranks of the first, which then computes with its weights."""
        with pytest.raises(UserError, match=r"another pipeline .* \(session\.close\(\)\)"):
            build_pipeline(preset(gpus=2))

    def test_released_caches_and_decoders_are_released_everywhere(self, family: Family) -> None:
        """Fidelity makes a cache and two decoders per preset: the other ranks would keep them all."""
        pipeline = build_pipeline(preset(gpus=2, **FUSED), family)
        leader = pipeline.ranks
        held = [pipeline.make_cache(), pipeline.make_vae_decoder(), pipeline.make_vae_decoder()]
        held[1].continue_from(held[2])
        assert leader.replies("held") == [{"caches": 1, "decoders": 2}]
        held.clear()
        assert leader.replies("held") == [{"caches": 0, "decoders": 0}]

    def test_a_measurement_records_memory_and_communication(self, family: Family,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
        """Ranks that stay muted and compute with their own halves; a rank without its memory."""
        monkeypatch.setattr(protocol, "MUTED_BLOCKS", 1)
        monkeypatch.setattr(protocol, "MUTED_SWITCHES", 1)
        keys = {**FUSED, "warmup_blocks": 3}
        pipeline = build_pipeline(preset(gpus=2, **keys), family)
        measurement = protocol.Measurement(pipeline, PromptSchedule(("a fox", "a whale"), (2,)))
        events, _ = measurement._record(5, [3])
        section = measurement._ranks_section(pipeline.ranks, events, events)
        assert (section["count"], section["denoising"], section["decoding"]) == (2, 2, "split")
        cache = measurement.session.cache.nbytes / 1e9
        # The ranks hold the muted stream's cache until the next order.
        assert [rank["kv_cache"] for rank in section["memory_gb"]] == pytest.approx([cache, cache])
        assert set(section["exposed_ms"]) == {"denoise", "decode", "recache"}
        assert all(isinstance(value, float) for value in section["exposed_ms"].values())
        assert "the run was on cpu" in section["peak_allocated_gb"]["reason"]
        latents, _ = stream(measurement.session, 2)
        torch.testing.assert_close(latents, alone(**FUSED)[0][:4], rtol=0, atol=1e-4)

    def test_an_interrupt_in_a_pass_ends_all_ranks(self, family: Family) -> None:
        """Ctrl-C while a block is denoised: the other rank would wait for data that never come."""
        session = StreamingSession(build_pipeline(preset(gpus=2, **FUSED), family))
        chunks = session.stream("a fox")
        next(chunks)

        def interrupt(*arguments: Any, **keys: Any) -> Tensor:
            raise KeyboardInterrupt

        session.pipeline.sampler.forward._own = interrupt
        pids, started = list(family.pids.values()), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        assert not any(map(alive, pids)) and time.monotonic() - started < 10
        with pytest.raises(UserError, match="have ended; build the pipeline again"):
            session.reset()


class Held:
    """What has to be told when the ranks have ended."""

    released = 0

    def release(self) -> None:
        self.released += 1


class TestThreeRanks:
    RANKS = 3

    def test_relative_positions_and_bands_of_unequal_height(self, family: Family) -> None:
        """The sink turned by the wrong distance or with other heads; a band one row too high."""
        session = check_equal(family, use_static_kv=True, relative_rope=True, global_sink=False,
                              rank_exchange="peer")
        assert "bands of 3, 2, 3 rows" in session.pipeline.optimizations[-1]["report"]["done"]

    def test_a_tiny_vae_in_bands(self, family: Family) -> None:
        """A memory block without its halo, a halo that the enlargement has moved, rows of another band."""
        check_equal(family, vae="taew2_1", vae_weights="random", use_early_decode=True, height=96, **FUSED)

    def test_a_rank_that_only_decodes(self, family: Family) -> None:
        """Chunks out of order or lost, frames of the wrong block, a history that survives a reset."""
        session = StreamingSession(build_pipeline(preset(gpus=3, vae_ranks="own", **FUSED), family))
        assert "3 ranks; 2 denoise, with 6 heads" in session.pipeline.optimizations[-1]["report"]["done"]
        one = StreamingSession(build_pipeline(preset(use_async_vae=True, **FUSED)))
        for made, expected in zip(delayed(session), delayed(one), strict=True):
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-5 if made.is_floating_point() else 1)
        session.reset()
        # The decoder that is called directly, as by the comparison with the baseline.
        latents = torch.randn(1, 2, *session.pipeline.latent_shape)
        decoder, twin = (pipeline.make_vae_decoder() for pipeline in (session.pipeline, one.pipeline))
        for _ in range(2):
            torch.testing.assert_close(decoder.push(latents), twin.push(latents), rtol=0, atol=1e-4)
        again = session.pipeline.make_vae_decoder()
        again.continue_from(decoder)
        torch.testing.assert_close(again.push(latents), twin.push(latents), rtol=0, atol=1e-4)

    def test_a_killed_rank_ends_all_and_is_named(self, family: Family) -> None:
        """Out of memory on one host process: rank 0 would wait in a collective for ten minutes."""
        session = StreamingSession(build_pipeline(preset(gpus=3, **FUSED), family))
        chunks = session.stream("a fox")
        next(chunks)
        held, gone = Held(), Held()
        family.at_end(held.release)
        family.at_end(gone.release)
        del gone
        pids, started = family.pids, time.monotonic()
        os.kill(pids[2], signal.SIGKILL)
        with pytest.raises(RankFailed, match=r"rank 2 of 3 was killed by SIGKILL .* All ranks were ended"):
            for _ in chunks:
                pass
        assert not any(map(alive, pids.values())) and time.monotonic() - started < 10
        assert held.released == 1, "a kernel that waits for the dead rank would wait for ever"
        with pytest.raises(RankFailed, match="rank 2 of 3"):
            session.reset()


class TestFourRanks:
    RANKS = 4

    def test_fused_kernels_over_a_ring(self, family: Family) -> None:
        """Slots, tables or scales of a part of the tokens where those of all belong."""
        session = check_equal(family, rank_exchange="collective", **FUSED)
        assert "exchanged by collectives" in session.pipeline.optimizations[-1]["report"]["done"]

    @pytest.mark.parametrize("keys", [
        {"rank_exchange": "collective"}, {**FUSED, "rank_exchange": "collective"}, FUSED])
    def test_two_ranks_share_heads(self, family: Family, keys: dict[str, Any]) -> None:
        """Attention for the wrong half of the queries, a half that is sent to the ranks of the other."""
        session = check_equal(family, model="micro6", **keys)
        assert ("with 3 heads and 1/4 of the tokens each and 1/2 of the queries"
                in session.pipeline.optimizations[-1]["report"]["done"])

    def test_a_rank_that_fails_ends_all_and_is_named(self, family: Family) -> None:
        """An error on another rank: its traceback would be lost with its process."""
        session = StreamingSession(build_pipeline(preset(gpus=4, **FUSED), family))
        session.pipeline.ranks.order([3], "reset_decoder", 12345)
        pids, started = family.pids, time.monotonic()
        with pytest.raises(RankFailed, match=r"rank 3 of 4 failed: KeyError: 12345(.|\n)*in reset_decoder"):
            for _ in session.stream("a fox"):
                pass
        assert not any(map(alive, pids.values())) and time.monotonic() - started < 10


class TestEightRanks:
    RANKS = 8

    @pytest.mark.parametrize("keys, tolerance", [
        ({**FUSED, "rank_exchange": "collective"}, 1e-5), (REALTIME, 0.02)], ids=["fused", "realtime, peer"])
    def test_eight_ranks_share_twelve_heads(self, family: Family, keys: dict[str, Any],
                                            tolerance: float) -> None:
        """A count that does not divide the heads: half of the queries lost, or computed twice and added."""
        session = check_equal(family, tolerance, **EIGHT_PARTS, **keys)
        assert "8 denoise, with 3 heads and 1/8 of the tokens each and 1/2 of the queries" in (
            session.pipeline.optimizations[-1]["report"]["done"])


def delayed(session: StreamingSession) -> tuple[Tensor, Tensor]:
    """`stream` for sessions whose chunks come at different times: switches by block."""
    chunks = [(chunk.latents[0].clone(), chunk.frames[0].clone())
              for chunk in session.play(PromptSchedule(("a fox", "a whale", "an owl"), (2, 7)), 6)]
    latents, frames = zip(*chunks)
    return torch.cat(latents), torch.cat(frames).int()


def test_no_orphans_when_rank_0_is_killed(tmp_path: Path) -> None:
    """The kernel of a notebook that is restarted, or killed for its memory, leaves processes that hold GPUs.
    The script has no guard, so a rank that imported it would start ranks of its own.
    """
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_several_gpus as these
with these.micro.micro_model():
    from types import MappingProxyType
    from longlive_opt import config
    config.MODELS = MappingProxyType({{**config.MODELS, "micro12": these.MODEL}})
    session = these.StreamingSession(these.build_pipeline(these.preset(gpus=2, **these.FUSED)))
    for chunk in session.stream("a fox"):
        print(*session.pipeline.ranks.family.pids.values(), flush=True)
""")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1 and all(map(alive, pids))
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.parametrize(("keys", "message"), [
    ({"gpus": 5}, r"gpus: 5 do not divide the 12 attention heads of model micro12; use 2, 3, 4, 6, 12\."),
    ({"gpus": 8}, r"gpus: 8 do not divide the 12 tokens per latent frame of 48x64 .* use 2, 3, 4, 6, 12\."),
    ({"gpus": 6, "vae_ranks": "own"}, r"gpus: 6 do not divide \(with vae_ranks: own, 5 of them\) the 12 .* "
                                      r"use 2, 3, 4, 5, 7, 13\."),
    ({"gpus": 3, "width": 16}, r"gpus: 3 do not divide the 4 tokens per latent frame of 16x64 .* use 2, 4\."),
    ({"gpus": 3, "vae_ranks": "own", "use_early_frames": True}, r"use_early_frames: with gpus: 3 and "
                                                                r"vae_ranks: own, frames come a block later"),
    ({"gpus": 6}, r"gpus: 6 cannot share a picture of 64 rows, .* 16; use 4 or fewer, or vae_ranks: own"),
    ({"gpus": 4, "vae": "taew2_1", "vae_weights": "random"}, r"of 64 rows, .* 24; use 2 or fewer"),
    ({"gpus": 2, "vae": "taew2_1", "vae_weights": "random", **FUSED, "use_torch_compile": True},
     "use_torch_compile: with gpus: 2, vae: 'taew2_1' runs in bands"),
    ({"gpus": 2, "use_async_vae": True}, r"use_async_vae: with gpus: 2, .* switch use_async_vae off or use "
                                         r"vae_ranks: own"),
    ({"gpus": 0}, "gpus: 0 is too small"),
])
def test_what_cannot_be_shared_is_refused(keys: dict[str, Any], message: str) -> None:
    """A count that does not divide the work would fail in a reshape on every rank, minutes later."""
    with pytest.raises(UserError, match=message):
        preset(**keys)


def test_what_the_device_lacks_is_said_before_ranks_start() -> None:
    """Sixty lines of a rank's traceback for CUDA graphs on a laptop."""
    with pytest.raises(NotAvailable, match="use_cuda_graphs: CUDA graphs need device: cuda"):
        build_pipeline(preset(gpus=2, use_static_kv=True, use_cuda_graphs=True))


def test_the_baseline_has_one_gpu() -> None:
    """Everything in a campaign is compared with its baseline, which has no optimization."""
    with pytest.raises(UserError, match="gpus: 2 under the name 'baseline'"):
        check_baseline(preset(gpus=2))


def test_missing_gpus_are_refused() -> None:
    """NCCL's own error names an ordinal, minutes after the start."""
    wanted = dataclasses.replace(preset(gpus=2), device="cuda:7")
    with pytest.raises(NotAvailable, match=r"gpus: 2 GPUs from cuda:7 on .* sees \d+; write gpus: 1 or less"):
        rank_device(wanted, 0)


# ---- on GPUs


def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [
    {"use_static_kv": True, "use_fused_kernels": True, "use_cuda_graphs": True, "use_early_decode": True},
    {"use_static_kv": True, "use_fused_kernels": True, "use_cuda_graphs": True,
     "rank_exchange": "collective"},
    {"use_quantized_kv": True, "kv_quantization": "fp8", "use_fused_kernels": True, "use_cuda_graphs": True},
    {"use_static_kv": True, "use_fused_kernels": True, "use_cuda_graphs": True, "vae_ranks": "own"},
])
def test_two_gpus_equal_one(keys: dict[str, Any]) -> None:
    """A collective that a graph does not repeat, a buffer that a replay overwrites too early."""
    two_gpus()
    common = {"model": "tiny", "weights": "random", "device": "cuda", "vae_chunk_latents": 3}
    schedule = PromptSchedule(("a fox", "a whale", "an owl"), (6, 21))

    def made(**more: Any) -> Tensor:
        given = {**common, **keys, **more}
        if "gpus" not in given:
            given = {key: given[key] for key in given.keys() - {"vae_ranks", "rank_exchange"}}
        session = StreamingSession(build_pipeline(ExperimentConfig.from_mapping(given)))
        for _ in range(2):  # the second stream replays
            latents = torch.cat([chunk.latents[0].clone() for chunk in session.play(schedule, 10)])
            session.reset()
        session.close()
        return latents.cpu().float()

    one, two = made(), made(gpus=2)
    # Only the first blocks: with random weights, rounding grows from block to block.
    assert (two - one)[:9].norm() / one[:9].norm() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["collective", "peer"])
def test_a_killed_rank_does_not_hang_the_gpu(exchange: str) -> None:
    """A kernel of NCCL, or one that waits for stores of a dead rank, waits for ever, and so does rank 0's
    synchronise.
    """
    two_gpus()
    keys = {"model": "tiny", "weights": "random", "device": "cuda", "use_cuda_graphs": True, "gpus": 2,
            "rank_exchange": exchange}
    session = StreamingSession(build_pipeline(ExperimentConfig.from_mapping({**keys, **FUSED})))
    pids, started = session.pipeline.ranks.family.pids, time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        for chunk in session.stream("a fox"):
            if chunk.block == 4:
                os.kill(pids[1], signal.SIGKILL)
                started = time.monotonic()
    assert time.monotonic() - started < 15 and not any(map(alive, pids.values()))


@pytest.mark.gpu
def test_graphs_do_not_delay_the_end() -> None:
    """NCCL leaves only when no graph contains its kernels: ten minutes, or for ever at the end of a notebook.
    """
    two_gpus()
    keys = {"model": "tiny", "weights": "random", "device": "cuda", "use_cuda_graphs": True, "gpus": 2}
    for _ in range(2):  # the second family joins after the first
        session = StreamingSession(build_pipeline(ExperimentConfig.from_mapping({**keys, **FUSED})))
        for _ in session.stream("a fox", 6):
            pass
        started = time.monotonic()
        session.close()
        assert time.monotonic() - started < 10 and not torch.distributed.is_initialized()
