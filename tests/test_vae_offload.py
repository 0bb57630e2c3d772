"""VAE offload: the order in which parts of the history come and go, on the CPU with copies that are as late
as they may be, and on a GPU with a bus that is slow.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from micro import micro_model, micro_pipeline

from longlive_opt.config import ExperimentConfig
from longlive_opt.models.vae import StreamingDecoder
from longlive_opt.optimizations import build_pipeline, vae_offload
from longlive_opt.optimizations.vae_offload import OffloadedHistory, PrefetchedHistory, Transfer


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with micro_model():
        yield


class RecordedStreams:
    """`TransferStreams` without a GPU: copies arrive when they are received and are back when the next ones
    are sent, the latest moments at which they may.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.fetched = 0
        self._arriving, self._departing = None, None

    def begin(self):
        # The next call's first fetch waits for what departed.
        self._depart()
        self._arriving = None

    def fetch(self, hosted):
        assert self._arriving is None
        self._arriving = hosted

    def receive(self):
        parts, self._arriving = tuple(h.clone() for h in self._arriving), None
        self.fetched += len(parts)
        return parts

    def send(self, parts, hosted):
        self._depart()
        self._departing = list(zip(parts, hosted, strict=True))

    def finish(self):
        self._depart()

    def _depart(self):
        for part, h in self._departing or ():
            h.copy_(part)
        self._departing = None


def test_visiting_history_is_that_of_the_next_stage():
    """A part that goes to another stage, is fetched twice or comes back to another's place; one that is left
    out after a call that failed.
    """
    pipeline = micro_pipeline(height=16, width=16)
    counts = [len(stage.history_channels) for stage in pipeline.vae.decoder.stages()]
    streams = RecordedStreams()
    expected, found = pipeline.make_vae_decoder(), pipeline.make_vae_decoder()
    found.keep_history_on_host(lambda parts: PrefetchedHistory(parts, counts, streams))
    places = [h.data_ptr() for h in found.history]
    for part in torch.randn(3, 1, 3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0)):
        assert torch.equal(found.push(part)[0], expected.push(part)[0])
    assert streams.fetched == 9 * len(places) and [h.data_ptr() for h in found.history] == places

    simple = pipeline.make_vae_decoder()
    simple.keep_history_on_host(lambda parts: OffloadedHistory(parts, torch.device("cpu")))
    failing = PrefetchedHistory(list(found.history), counts, streams)
    failing.take(counts[0])
    for decoder in (expected, found):
        decoder.reset()
    for part in (part, part):
        frames = expected.push(part)[0]
        assert torch.equal(found.push(part)[0], frames) and torch.equal(simple.push(part)[0], frames)


def test_nothing_of_a_stage_outlives_it():
    """A stage's new history on the GPU while the next one runs, although it lies on the host: 0.3 GB."""
    decoder = micro_pipeline(height=16, width=16).make_vae_decoder()
    made, alive = [], []

    class Watched(OffloadedHistory):
        def take(self, count):
            alive.append(sum(part() is not None for part in made))
            return tuple(part.clone() for part in super().take(count))

        def put(self, updated):
            super().put(updated)
            made.extend(map(weakref.ref, updated))

    decoder.keep_history_on_host(lambda parts: Watched(parts, torch.device("cpu")))
    decoder.push(torch.zeros(1, 3, *decoder.shape[1:]))
    assert len(made) == 3 * len(decoder.history) and not any(alive)


# On a GPU.


def gpu_decoders(ahead: bool, compiled: bool = False) -> list[StreamingDecoder]:
    """One with its history on the GPU and two with theirs on the host."""
    keys = {"device": "cuda", "model": "tiny", "weights": "random", "model_dtype": "bfloat16",
            "use_static_kv": True, "use_torch_compile": compiled}
    offload = {"use_vae_offload": True, "vae_offload_ahead": ahead}
    plain, offloaded = (build_pipeline(ExperimentConfig(**keys, **more)) for more in ({}, offload))
    return [pipeline.make_vae_decoder() for pipeline in (plain, offloaded, offloaded)]


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_vae_offload_gives_the_same_bits(compiled, ahead):
    """A part that is overwritten on the host before the GPU has read it, or two decoders that share one."""
    latents = torch.randn(4, 1, 3, 16, 16, 16, device="cuda", dtype=torch.bfloat16)
    expected, found, fork = gpu_decoders(ahead, compiled)
    for part in latents:
        fork.continue_from(found)
        assert all(h.is_pinned() for decoder in (found, fork) for h in decoder.history)
        frames = expected.push(part)[0]
        assert torch.equal(fork.push(part)[0], frames)
        assert torch.equal(found.push(part)[0], frames)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", [("coming",), ("going",), ("coming", "going")], ids=str)
def test_vae_offload_waits_for_a_slow_bus(slow, monkeypatch):
    """A stage that reads before its part is there, memory that is used again while it is still copied."""
    class SlowTransfer(Transfer):
        def __init__(self, sources, parts, stream, decoding):
            if ("coming" if parts[0].is_cuda else "going") in slow:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(5_000_000)
            super().__init__(sources, parts, stream, decoding)

    monkeypatch.setattr(vae_offload, "Transfer", SlowTransfer)
    latents = torch.randn(4, 1, 3, 16, 16, 16, device="cuda", dtype=torch.bfloat16)
    expected, found, _ = gpu_decoders(ahead=True)
    wanted = [expected.push(part)[0] for part in latents]
    assert all(map(torch.equal, [found.push(part)[0] for part in latents], wanted))
    found.reset()
    assert all(map(torch.equal, [found.push(part)[0] for part in latents], wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True])
def test_vae_offload_leaves_the_history_on_the_host(ahead):
    """Copies that stay on the GPU: the memory that the optimization is for."""
    plain, offloaded, _ = gpu_decoders(ahead)
    latents, held = torch.randn(1, 3, 16, 16, 16, device="cuda", dtype=torch.bfloat16), []
    gc.collect()
    for decoder in (plain, offloaded):
        before = torch.cuda.memory_allocated()
        decoder.push(latents)
        held.append(torch.cuda.memory_allocated() - before)
    history = sum(h.nbytes for h in plain.history)
    assert held[0] >= history > 2 * held[1]
