"""VAE offload: the VAE's history stays in host memory and moves to the GPU stage by stage.

Idea: every causal convolution of the decoder keeps two frames, 1.9 GB at 480x832, and needs them once per
call. Here they are in page-locked host memory. A stage's part is copied in when that stage runs and copied
back afterwards. With `ahead`, the next stage's part is copied in and the previous one's copied back while a
stage runs, each on its own stream: the bus works in both directions at once.

Replaces: `make_vae_decoder`. Costs: 3.8 GB over the bus for each VAE call, about 75 ms at 50 GB/s, during
which the stream waits; so decode a whole block in one call if memory allows. `ahead` can hide most of that
behind a call of one latent (38 ms compiled, on an H100). It needs memory for parts in transit: up to twice
the history of the largest stage, 0.3 GB each. Bit-exact: the same kernels on the same numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch
from torch import Tensor

from ..models.vae import History, StreamingDecoder
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization


@dataclass(frozen=True)
class VAEOffload(Optimization):
    name: ClassVar[str] = "vae_offload"
    exactness: ClassVar[Exactness] = "bitwise"

    ahead: bool = False

    def apply(self, pipeline: Pipeline) -> Pipeline:
        make_inner, device = pipeline.make_vae_decoder, pipeline.device
        counts = [len(stage.history_channels) for stage in pipeline.vae.decoder.stages()]

        def make_decoder() -> StreamingDecoder:
            decoder = make_inner()
            if device.type == "cuda" and self.ahead:
                streams = TransferStreams(device)
                decoder.keep_history_on_host(lambda parts: PrefetchedHistory(parts, counts, streams))
            elif device.type == "cuda":
                decoder.keep_history_on_host(lambda parts: OffloadedHistory(parts, device))
            return decoder

        pipeline = dataclasses.replace(pipeline, make_vae_decoder=make_decoder)
        done = "the history of the VAE's convolutions stays in host memory"
        if device.type != "cuda":
            done += ", which is this device's own memory"
        elif self.ahead:
            done += " and moves while the VAE works"
        return self.report(pipeline, done)


class OffloadedHistory:
    """A `StageHistory` in host memory whose parts are copied on the decoding stream."""

    def __init__(self, parts: list[Tensor], device: torch.device):
        self._hosted = parts
        self._device = device
        self._taken = self._returned = 0

    def take(self, count: int) -> History:
        self._taken += count
        return tuple(h.to(self._device, non_blocking=True)
                     for h in self._hosted[self._taken - count:self._taken])

    def put(self, updated: History) -> None:
        for h, new in zip(self._places(updated), updated, strict=True):
            h.copy_(new, non_blocking=True)

    def whole(self) -> History:
        return tuple(self._hosted)

    def _places(self, updated: History) -> list[Tensor]:
        """The host tensors for `updated`, which comes back next."""
        self._returned += len(updated)
        return self._hosted[self._returned - len(updated):self._returned]


class TransferStreams:
    """Moves parts of a history between host and GPU, with one stream per direction; outlives a call.

    Memory is allocated on the decoding stream, which uses it last. So that stream waits for pending copies
    before its memory is freed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._coming, self._going = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arrival: Transfer | None = None
        self._departure: Transfer | None = None

    def begin(self) -> None:
        """Begin a call: the parts it fetches must be back from the last call."""
        self._coming.wait_stream(self._going)
        self._arrival = _ended(self._arrival)  # from a call that failed

    def fetch(self, hosted: list[Tensor]) -> None:
        """Start copying `hosted` to the GPU; receive the copies before fetching the next ones."""
        running = torch.cuda.current_stream(self.device)
        parts = tuple(torch.empty_like(h, device=self.device) for h in hosted)
        self._coming.wait_stream(running)
        self._arrival = Transfer(hosted, parts, self._coming, running)

    def receive(self) -> History:
        """Return the fetched tensors; the decoding stream waits for them."""
        parts, self._arrival = self._arrival.parts, _ended(self._arrival)
        return parts

    def send(self, parts: History, hosted: list[Tensor]) -> None:
        """Send `parts` back to `hosted`; the decoding stream waits for those sent before."""
        running = torch.cuda.current_stream(self.device)
        self._departure = _ended(self._departure)
        self._going.wait_stream(running)
        self._departure = Transfer(parts, hosted, self._going, running)

    def finish(self) -> None:
        """End a call: the decoding stream waits for everything still on its way back."""
        self._departure = _ended(self._departure)


class Transfer:
    """Tensors that are copied on `stream`. It keeps both sides alive until `decoding`, the stream that uses
    the GPU's side, waits for it.
    """

    def __init__(self, sources: Sequence[Tensor], parts: Sequence[Tensor], stream: torch.cuda.Stream,
                 decoding: torch.cuda.Stream):
        self.parts = parts
        self._sources, self._decoding = sources, decoding
        with torch.cuda.stream(stream):
            for source, part in zip(sources, parts, strict=True):
                part.copy_(source, non_blocking=True)
            self._done = stream.record_event()

    def end(self) -> None:
        """Make the decoding stream wait until the copies have arrived."""
        self._decoding.wait_event(self._done)


def _ended(transfer: Transfer | None) -> None:
    if transfer is not None:
        transfer.end()


class PrefetchedHistory(OffloadedHistory):
    """A `StageHistory` in host memory that fetches the next stage's part before a stage runs."""

    def __init__(self, parts: list[Tensor], counts: Sequence[int], streams: TransferStreams):
        """Args: counts: number of history tensors of each stage, in order."""
        super().__init__(parts, streams.device)
        self._streams = streams
        self._due = [count for count in counts if count]
        streams.begin()
        self._fetch()

    def take(self, count: int) -> History:
        if not count:
            return ()
        parts = self._streams.receive()
        self._fetch()
        return parts

    def put(self, updated: History) -> None:
        if updated:
            self._streams.send(updated, self._places(updated))

    def whole(self) -> History:
        self._streams.finish()
        return super().whole()

    def _fetch(self) -> None:
        if self._due:
            count = self._due.pop(0)
            self._streams.fetch(self._hosted[self._taken:self._taken + count])
            self._taken += count
