"""The rule of the cache against the tables of SPEC 4.3 and 5, and the reference that carries it out.

Values carry a tag, frame + 1000 * pass, and are not rotated: what a slot holds and what a query attends can
be read.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.streaming.kv_cache import CacheGeometry, PassPlan, RollingKVCache, plan_pass

TOKENS, HEADS, DEPTH = 2, 1, 6
CPU = torch.device("cpu")


class Traced:
    """A one-layer cache whose passes are fed with tags and whose attention notes what it is shown."""

    def __init__(self, window: int = 12, sink: int = 3, relative_rope: bool = False, batch: int = 1):
        geometry = CacheGeometry(1, HEADS, DEPTH, 1, TOKENS, window, sink, relative_rope)
        self.cache = RollingKVCache(geometry, self._attend, batch, CPU, torch.float32)
        self.passes = 0
        self.attended: list[float] = []
        self.positions: list[tuple[Tensor, Tensor]] = []

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert k.shape == v.shape
        self.attended = v[0, ::TOKENS, 0, 0].tolist()
        self.positions.append((q, k))
        return q

    def run(self, start: int, frames: int, tag: float | None = None, recache_sink: bool = False,
            store_only: bool = False) -> PassPlan:
        """One pass; its frames are tagged frame + tag (None: 1000 times the number of the pass)."""
        self.passes += 1
        tag = 1000.0 * self.passes if tag is None else tag
        tags = torch.arange(start, start + frames) + tag
        kv = tags.repeat_interleave(TOKENS).view(1, -1, 1, 1).expand(1, -1, HEADS, DEPTH).contiguous()
        kv = kv.expand(self.cache.layers[0].key.shape[0], -1, -1, -1)
        plan = self.cache.begin(start, frames, recache_sink=recache_sink)
        if store_only:
            self.cache.layers[0].store(kv, kv)
        else:
            self.cache.layers[0].attend(kv, kv, kv)
        self.cache.end()
        return plan

    def block(self, start: int, frames: int = 3, tag: float = 0.0) -> None:
        """Four noisy passes (tag + 0.5), then the clean one (tag)."""
        for _ in range(4):
            self.run(start, frames, tag + 0.5)
        self.run(start, frames, tag)

    def slots(self) -> list[float]:
        return self.cache.layers[0].value[0, ::TOKENS, 0, 0].tolist()


def filled_to(end: int, window: int = 12, sink: int = 3, block: int = 3) -> Traced:
    traced = Traced(window, sink)
    for start in range(0, end, block):
        traced.block(start, block)
    return traced


# SPEC 4.3, W = 12, S = 3, blocks of 3: block start -> evicted, attended frames (by slot).
TABLE_4_3 = {
    0: (0, [0, 1, 2]),
    3: (0, [0, 1, 2, 3, 4, 5]),
    6: (0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    9: (0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    12: (3, [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
    15: (3, [0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 16, 17]),
    18: (3, [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
    21: (3, [0, 1, 2, 15, 16, 17, 18, 19, 20, 21, 22, 23]),
}


def test_table_of_normal_generation():
    """SPEC 4.3: a roll on every pass, a sink that moves, the current block missing from its own keys."""
    traced = Traced()
    for start, (evicted, frames) in TABLE_4_3.items():
        for number in range(5):
            noisy = 0.5 if number < 4 else 0.0
            plan = traced.run(start, 3, noisy)
            assert plan.evict == (evicted if number == 0 else 0)
            assert plan.first == len(frames) - 3 and plan.dropped == 0
            expected = [frame + (noisy if frame >= start else 0) for frame in frames]
            assert traced.attended == expected
            assert traced.slots()[:len(frames)] == expected
        assert traced.cache.pointers == (start + 3, len(frames))
    assert traced.run(24, 3).filled == 12


def test_steady_state_attends_the_whole_window():
    """18720 keys at full size: 12 frames of 1560 tokens."""
    traced = filled_to(30)
    assert len(traced.attended) == 12
    assert traced.cache.layers[0].key.shape[1] == 12 * TOKENS


@pytest.mark.parametrize("s, recache_sink, expected", [
    # Window not full: everything, the sink too, for either value of global_sink.
    (6, False, [100, 101, 102, 103, 104, 105]),
    (6, True, [100, 101, 102, 103, 104, 105]),
    # Exactly full: P is 0, so the sink is overwritten even with global_sink true.
    (12, False, [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]),
    (12, True, [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]),
    # Beyond, global_sink true: slots 3-11 are frames s-9 .. s-1, the sink keeps what it had.
    (15, False, [0, 1, 2, 106, 107, 108, 109, 110, 111, 112, 113, 114]),
    (24, False, [0, 1, 2, 115, 116, 117, 118, 119, 120, 121, 122, 123]),
    # Beyond, global_sink false: the sink becomes frames s-12 .. s-10.
    (15, True, [103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114]),
    (24, True, [112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123]),
])
def test_table_of_recaches(s, recache_sink, expected):
    """SPEC 5: which slots a recache at frame s writes, what it attends, and the pointers after it."""
    traced = filled_to(s)
    n = min(12, s)
    plan = traced.run(s - n, n, tag=100, recache_sink=recache_sink)
    assert traced.slots()[:len(expected)] == expected == traced.attended
    assert traced.cache.pointers == (s, min(s, 12))
    assert plan.evict == 0 and plan.dropped == (3 if s > 12 and not recache_sink else 0)
    traced.block(s, tag=0)
    sink, past = expected[:3], expected[3 + max(0, len(expected) + 3 - 12):]
    assert traced.attended == sink + past + [s, s + 1, s + 2]


def test_recache_of_the_last_nine_frames_leaves_the_same_cache():
    """What a fast preset does instead of twelve: the three oldest frames are queries only."""
    whole, trimmed = filled_to(21), filled_to(21)
    whole.run(9, 12, tag=100)
    trimmed.run(12, 9, tag=100)
    assert whole.slots() == trimmed.slots() and whole.attended == trimmed.attended
    assert whole.cache.pointers == trimmed.cache.pointers


def test_second_switch_right_after_a_recache():
    """Two switch frames in one block: the second acts one block later, on the state that the first left."""
    traced = filled_to(15)
    traced.run(3, 12, tag=100)
    traced.block(15, tag=100)
    traced.run(6, 12, tag=200)
    assert traced.slots() == [0, 1, 2, *range(209, 218)]
    traced.run(18, 3, 200)
    assert traced.attended == [0, 1, 2, *range(212, 221)]


def test_sink_larger_than_the_block_keeps_the_first_noisy_pass():
    """SPEC 11: the guard that protects the sink also keeps a sink block's clean pass out of it. Block 0 is
    not guarded.
    """
    traced = Traced(window=9, sink=6)
    for number, start in enumerate((0, 3)):
        for step in range(5):
            traced.run(start, 3, tag=10.0 * step)
    assert traced.slots()[:6] == [40, 41, 42, 3, 4, 5]
    assert traced.run(3, 3, tag=90.0).write_from == 6
    assert traced.attended[:6] == [40, 41, 42, 3, 4, 5]


def test_unfilled_sink_slots_are_attended_as_zeros():
    """SPEC 4.2: attended are [0, S) and the window. While a sink larger than the block fills, its empty slots
    are zero keys with weight exp(0); leaving them out changes the first blocks.
    """
    traced = Traced(window=9, sink=6)
    traced.run(0, 3, tag=10.0)
    assert traced.attended == [10, 11, 12, 0, 0, 0]


def naive(state: tuple[list[float], int, int], window: int, sink: int, start: int, n: int, tag: float,
          recache_sink: bool) -> tuple[list[float], int, int]:
    """SPEC 4.2 on a list of tags; returns (slots, G, L) after the pass."""
    slots, G, L = list(state[0]), state[1], state[2]
    E = start + n
    recompute = E <= G and start > 0
    if E > G and L + n > window:
        ev = L + n - window
        slots[sink:L - ev] = slots[sink + ev:L]
        new_L = L + (E - G) - ev
        first = new_L - n
        w = max(first, sink) if recompute else first
    else:
        new_L = L + (E - G)
        first = new_L - n
        w = first if recache_sink or not recompute else max(first, sink)
    for slot in range(w, new_L):
        slots[slot] = start + slot - first + tag
    return (slots, G, L) if recompute else (slots, E, new_L)


@pytest.mark.parametrize("window, sink, block", [
    (w, s, b) for w, s, b in product((6, 7, 9, 12), (0, 1, 3, 6), (1, 2, 3, 4)) if w >= s + b])
def test_any_size_follows_the_rule(window, sink, block):
    """A window that is no multiple of the block evicts part of a block; random recaches in between."""
    generator = torch.Generator().manual_seed(window * 100 + sink * 10 + block)
    traced, state = Traced(window, sink), ([0.0] * window, 0, 0)
    for start in range(0, 3 * window, block):
        if start and torch.rand((), generator=generator) < 0.4:
            n, recache_sink = min(window, start), bool(torch.rand((), generator=generator) < 0.5)
            traced.run(start - n, n, 1000.0 * start, recache_sink)
            state = naive(state, window, sink, start - n, n, 1000.0 * start, recache_sink)
            assert traced.slots()[:state[2]] == state[0][:state[2]]
        for step in (0.25, 0.5, 0.0):
            traced.run(start, block, step)
            state = naive(state, window, sink, start, block, step, False)
        assert traced.slots()[:state[2]] == state[0][:state[2]]
        assert traced.attended == state[0][:max(state[2], sink)] and traced.cache.pointers == state[1:]


def test_repeated_pass_moves_nothing():
    """`write` is idempotent: four denoising passes and the clean pass share their slots."""
    traced = filled_to(18)
    before = traced.slots()
    for _ in range(3):
        traced.block(15)
        assert traced.slots() == before and traced.cache.pointers == (18, 12)


def test_store_leaves_what_attend_leaves():
    """The keys-only pass must roll and write as the full one does, keys included."""
    attend, store = filled_to(12), filled_to(12)
    attend.run(12, 3, tag=7)
    store.run(12, 3, tag=7, store_only=True)
    for a, b in zip(attend.cache.layers, store.cache.layers):
        assert torch.equal(a.key, b.key) and torch.equal(a.value, b.value)
    assert attend.cache.pointers == store.cache.pointers


@pytest.mark.parametrize("start, frames", [(16, 3), (3, 3), (9, 3), (12, 0), (15, 13), (14, 3)])
def test_pass_with_no_place_is_refused(start, frames):
    """A gap, frames before the last ones, none, more than the window, half new and half known."""
    with pytest.raises(ValueError, match="cannot place latent frames"):
        filled_to(15).cache.begin(start, frames)


def test_refused_pass_leaves_the_cache_usable():
    """Half-updated pointers after an error."""
    traced = filled_to(15)
    with pytest.raises(ValueError):
        traced.cache.begin(16, 3)
    assert traced.cache.pointers == (15, 12)
    assert traced.run(15, 3).evict == 3


def test_pass_outside_begin_and_end_is_refused():
    """A layer that attends with the plan of the last pass writes into the wrong slots."""
    traced = filled_to(3)
    kv = torch.zeros(1, 3 * TOKENS, HEADS, DEPTH)
    with pytest.raises(AssertionError):
        traced.cache.layers[0].attend(kv, kv, kv)
    with pytest.raises(AssertionError):
        traced.cache.end()
    with pytest.raises(AssertionError):
        traced.cache.signature


def test_absolute_positions_end_and_relative_ones_do_not():
    """Frame 1024 has no row in LongLive's tables; the infinity variant has no such limit."""
    absolute, relative = Traced(window=64, sink=0), Traced(window=64, sink=0, relative_rope=True)
    for start in range(0, 1024, 64):
        absolute.run(start, 64)
        relative.run(start, 64)
    with pytest.raises(UserError, match="relative_rope: true"):
        absolute.cache.begin(1024, 1)
    assert absolute.cache.pointers == (1024, 64)
    assert relative.run(1024, 64).filled == 64


def test_relative_positions_are_slots_and_absolute_ones_frames():
    """SPEC 2.4 and 6. All keys equal: rotated keys then show their positions."""
    def keys_of_last_pass(relative_rope: bool) -> tuple[Tensor, Tensor]:
        traced = Traced(relative_rope=relative_rope)
        for start in range(0, 18, 3):
            ones = torch.ones(1, 3 * TOKENS, HEADS, DEPTH)
            traced.cache.begin(start, 3)
            traced.cache.layers[0].attend(ones, ones, ones)
            traced.cache.end()
        return traced.positions[-1]

    def rotated(positions: list[int]) -> Tensor:
        # Depth 6 has one pair per axis, each of frequency 1; the second and third are row 0 and the column.
        angles = torch.tensor(positions, dtype=torch.float64).repeat_interleave(TOKENS)
        return torch.stack([angles.cos() - angles.sin(), angles.sin() + angles.cos()], dim=-1).float()

    q, k = keys_of_last_pass(False)
    torch.testing.assert_close(k[0, :, 0, :2], rotated([0, 1, 2, *range(9, 18)]))
    torch.testing.assert_close(q[0, :, 0, :2], rotated([15, 16, 17]))
    q, k = keys_of_last_pass(True)
    torch.testing.assert_close(k[0, :, 0, :2], rotated(list(range(12))))
    torch.testing.assert_close(q[0, :, 0, :2], rotated([9, 10, 11]))


def test_reset_forgets_and_memory_stays():
    """Frames of the last video attended in the next, or a cache that grows."""
    traced = filled_to(24)
    nbytes, addresses = traced.cache.nbytes, [layer.key.data_ptr() for layer in traced.cache.layers]
    assert nbytes == 2 * 12 * TOKENS * HEADS * DEPTH * 4
    traced.cache.reset()
    assert traced.cache.pointers == (0, 0)
    traced.block(0, tag=500)
    assert traced.attended == [500, 501, 502]
    assert traced.cache.nbytes == nbytes
    assert [layer.key.data_ptr() for layer in traced.cache.layers] == addresses


def test_signature_is_one_for_equal_passes_and_differs_otherwise():
    """A captured graph replayed for another fill of the window, or captured anew for every block."""
    traced, kinds, steady = Traced(), [], []
    for start in range(0, 24, 3):
        for number in range(5):
            traced.cache.begin(start, 3)
            (steady if start >= 12 else kinds).append(traced.cache.signature)
            traced.cache.end()
    assert len(set(kinds)) == 4, "one kind per fill of the window"
    assert len(set(steady)) == 2, "the pass that rolls and those that do not"
    traced.cache.begin(12, 12)
    assert traced.cache.signature not in {*kinds, *steady}


def test_samples_of_a_batch_are_kept_apart():
    """A buffer for one sample that broadcasts."""
    geometry = CacheGeometry(1, HEADS, DEPTH, 1, TOKENS, 4, 1)
    cache = RollingKVCache(geometry, lambda q, k, v: v, 2, CPU, torch.float32)
    kv = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 2 * TOKENS, HEADS, DEPTH)
    for start in (0, 2, 4):
        cache.begin(start, 2)
        attended = cache.layers[0].attend(kv, kv, kv)
        cache.end()
    assert (attended[0] == 0).all() and (attended[1] == 1).all()


def test_plan_is_a_pure_function():
    """The rule is shared by every cache; hidden state would make them differ."""
    args = dict(window=12, sink=3, end=18, filled=12)

    def numbers(plan: PassPlan) -> list[int]:
        return [plan.start, plan.frames, plan.evict, plan.first, plan.write_from, plan.filled, plan.end]

    assert plan_pass(18, 3, **args) == plan_pass(18, 3, **args)
    assert numbers(plan_pass(18, 3, **args)) == [18, 3, 3, 9, 9, 12, 21]
    assert numbers(plan_pass(6, 12, **args)) == [6, 12, 0, 0, 3, 12, 18]
    assert numbers(plan_pass(6, 12, recache_sink=True, **args)) == [6, 12, 0, 0, 0, 12, 18]
