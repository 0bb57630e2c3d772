"""Claims about what a viewer sees, by hand and by brute force."""

import numpy as np
import pytest

from longlive_opt.errors import UserError
from longlive_opt.measurement.metrics import playback


def test_playback_by_hand():
    """Would catch: a buffer that ignores frames already shown, or a stall counted twice."""
    # 10 frames a chunk at 25 FPS last 400 ms. Due at 0, 400, 800, 1200; ready at 0, 300, 1000, 1150.
    view = playback([50, 350, 1050, 1200], [10] * 4, 25.0)
    assert view["startup_buffer_ms"] == pytest.approx(200)
    assert view["stalls_at_zero_buffer"] == 1 and view["stall_ms_at_zero_buffer"] == pytest.approx(200)
    assert view["deadline_miss_share"] == pytest.approx(1 / 3)
    assert view["sustained"] and view["deadline_ms"] == 400


def test_the_first_chunk_is_shorter_than_the_others():
    """Would catch: 12 frames assumed for the first chunk of 9, hiding a stall after it."""
    # 9 frames at 16 FPS last 562.5 ms, 12 last 750.
    view = playback([0, 700, 1400], [9, 12, 12], 16.0)
    assert view["startup_buffer_ms"] == pytest.approx(137.5) and view["stalls_at_zero_buffer"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_buffer_never_stalls_and_nothing_smaller_does(seed):
    """Would catch: any slip in the simulation, by brute force over every frame."""
    rng = np.random.default_rng(seed)
    ready = np.cumsum(rng.uniform(200, 700, 40))
    frames = rng.integers(1, 14, 40)
    view = playback(list(ready), [int(n) for n in frames], 25.0)
    arrival = np.repeat(ready, frames)
    due = ready[0] + np.arange(len(arrival)) * 40.0
    assert (arrival <= due + view["startup_buffer_ms"] + 1e-6).all()
    assert view["startup_buffer_ms"] == 0 or (arrival > due + view["startup_buffer_ms"] - 1e-3).any()
    assert view["stall_ms_at_zero_buffer"] == pytest.approx(view["startup_buffer_ms"])


def test_a_slow_stream_says_that_its_buffer_is_only_for_this_length():
    """Would catch: a start-up buffer sold as a property of the preset where production never catches up."""
    view = playback([0, 500, 1000], [12] * 3, 25.0)
    assert not view["sustained"] and "longer stream" in view["note"]


@pytest.mark.parametrize(("ready", "frames", "fps"), [([0, 1], [12], 25), ([], [], 25), ([0, 1], [12, 0], 25),
                                                      ([5, 1], [12, 12], 25), ([0, 1], [12, 12], 0)])
def test_playback_refuses_nonsense(ready, frames, fps):
    """Would catch: chunks out of order or lengths that zip() would cut silently."""
    with pytest.raises(UserError, match="playback"):
        playback(ready, frames, fps)
