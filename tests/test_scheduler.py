"""The flow-matching schedule against the recorded tables and against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longlive_opt.streaming.sampler import TRAIN_STEPS, FlowSchedule

GOLDEN = Path(__file__).parent / "golden"
STEPS = (1000, 750, 500, 250)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "scheduler.safetensors")


def test_tables_are_the_recorded_ones(golden):
    """A shift applied twice, a sigma of 0 at the end, float64 tables: one ulp moves every later lookup."""
    schedule = FlowSchedule(5.0)
    assert torch.equal(schedule.sigmas, golden["sigmas"]) and schedule.sigmas.dtype == torch.float32
    assert torch.equal(schedule.timesteps, golden["timesteps"])
    assert torch.equal(torch.tensor(schedule.warped_steps(STEPS)), golden["warped_steps"])
    assert len(schedule.sigmas) == TRAIN_STEPS
    assert schedule.sigmas[-1].item() == pytest.approx(0.00498008, abs=1e-8)


def test_warped_steps_of_the_specification():
    """The model is given these numbers; 937.4999 instead of 937.5 turns the phase of its fastest sinusoid."""
    schedule = FlowSchedule(5.0)
    assert schedule.warped_steps(STEPS) == [1000.0, 937.5, 833.3333129882812, 625.0]
    sigmas = schedule.sigma(torch.tensor(schedule.warped_steps(STEPS)))
    assert sigmas.tolist() == pytest.approx([1.0, 0.9375, 0.833333, 0.625], abs=1e-6)
    assert schedule.warped_steps([1]) == [pytest.approx(4.98008, abs=1e-5)]


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_other_shifts_follow_the_formula(shift):
    """A formula that is right for 5 only; exact fractions as the reference."""
    schedule, s = FlowSchedule(shift), Fraction(shift)
    for index in (0, 1, 250, 500, 999):
        u = 1 - Fraction(index, 1000)
        exact = s * u / (1 + (s - 1) * u)
        assert schedule.sigmas[index].item() == pytest.approx(float(exact), rel=1e-5)
        assert schedule.timesteps[index].item() == pytest.approx(1000 * float(exact), rel=1e-5)
    assert (schedule.timesteps.diff() < 0).all()


@pytest.mark.parametrize("prefix, dtype", [("", torch.float32), ("bf16_", torch.bfloat16)])
def test_conversions_are_the_recorded_ones(golden, prefix, dtype):
    """Sigma of the wrong step, float32 instead of float64, or a result in the wrong dtype; bit for bit."""
    schedule = FlowSchedule(5.0)
    flow, noisy, clean, noise = (golden[name].to(dtype) for name in ("flow", "xt", "clean", "noise"))
    x0 = schedule.x0_from_flow(flow, noisy, golden["t"])
    noised = schedule.add_noise(clean, noise, golden["t"])
    assert x0.dtype == noised.dtype == dtype
    assert torch.equal(x0, golden[f"{prefix}x0_from_flow"])
    assert torch.equal(noised, golden[f"{prefix}noised"])


def test_one_timestep_for_all_equals_one_each():
    """The sampler passes a number, the recording a tensor; they must take the same sigma."""
    schedule, generator = FlowSchedule(5.0), torch.Generator().manual_seed(0)
    flow, noisy = torch.randn(2, 3, 4, 5, generator=generator)
    for t in (1000.0, 833.3333129882812, 0.0):
        each = torch.full((3,), t)
        assert torch.equal(schedule.x0_from_flow(flow, noisy, t), schedule.x0_from_flow(flow, noisy, each))
        assert torch.equal(schedule.add_noise(flow, noisy, t), schedule.add_noise(flow, noisy, each))


def test_timestep_between_two_entries_takes_the_nearest_and_zero_the_last():
    """t = 0 has no entry of its own: it maps to sigma 0.00498, and the pass's "x0" is discarded."""
    schedule = FlowSchedule(5.0)
    assert schedule.sigma(0.0) == schedule.sigmas[-1]
    assert schedule.sigma(1e6) == schedule.sigmas[0]
    between = (schedule.timesteps[10] * 0.9 + schedule.timesteps[11] * 0.1).item()
    assert schedule.sigma(between) == schedule.sigmas[10]
    assert schedule.sigma(torch.tensor([[between]])).shape == (1, 1)


def test_noising_and_denoising_are_inverse():
    """flow = noise - clean: a sign error gives 2 * noise - clean."""
    schedule, generator = FlowSchedule(5.0), torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 1, 2, 3, generator=generator)
    for t in schedule.warped_steps(STEPS):
        noisy = schedule.add_noise(clean, noise, t)
        torch.testing.assert_close(schedule.x0_from_flow(noise - clean, noisy, t), clean, atol=1e-6, rtol=0)
