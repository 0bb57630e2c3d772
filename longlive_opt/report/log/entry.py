"""One run as the log reads it: its figures as text, and how it stands beside another."""

import math
import re
from dataclasses import dataclass, field, replace

from ...measurement import decision
from ...measurement.result import is_finite, is_na, lookup, number, numbers
from ..campaign import BASELINE, FIGURES, Result
from .markdown import digits, escape, sentence

SUMMARY_NAMES = {BASELINE: "Baseline", "quality": "Quality", "balanced": "Balanced", "speed": "Speed"}
QUALITY = {"PSNR": "psnr_db", "SSIM": "ssim", "LPIPS": "lpips", "CLIP Delta": "clip_delta"}
_DISTANCES = ("LPIPS", "ST-LPIPS")


@dataclass
class Run:
    """A preset that was run, as the log reads it: its figures as text, and why some are missing."""

    result: Result  # of a failed run: preset, title, hypothesis and parameters only
    failure: str = ""
    outcome: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    repeats: tuple[Result, ...] = ()  # of the same preset, in processes of their own

    @property
    def preset(self) -> str:
        return str(self.result["preset"])

    @property
    def name(self) -> str:
        return SUMMARY_NAMES.get(self.preset) or escape(self.result.get("title") or self.preset)

    def figure(self, label: str) -> str:
        """One of `FIGURES` as text."""
        return self.text(label, FIGURES[label])

    def cell(self, label: str) -> str:
        """One of `FIGURES` for a table: SS Max of a preset that was repeated comes with its range."""
        if label != "SS Max" or (among := self.range()) is None:
            return self.figure(label)
        return f"{self.figure(label)} ({among})"

    def range(self) -> str | None:
        """Between which values SS Max lay in this run and its repetitions; None where there are none."""
        values = [number(run, FIGURES["SS Max"]) for run in (self.result, *self.repeats)]
        if len(values) < 2 or None in values:
            return None
        return f"{digits(min(values))} to {digits(max(values))} over {len(values)} runs"

    def text(self, label: str, path: str) -> str:
        """The number at `path` as text, or n/a with a short reason; the long one is kept for the notes."""
        value = number(self.result, path)
        if value is not None:
            return digits(value)
        if self.failure:
            return f"n/a ({self.outcome})"
        places = (lookup(self.result, at) for at in (path, path.rpartition(".")[0]))
        absent = next(filter(is_na, places), {"reason": "not recorded", "how_to_fix": "run the preset again"})
        self.missing[label] = f"{absent['reason']}; {absent.get('how_to_fix', '')}"
        clause = re.split("[;:(]", absent["reason"])[0].strip()
        return f"n/a ({escape(clause if len(clause) <= 80 else clause[:79] + '…')})"


def matched_runs(run: Run, base: Run | None) -> tuple[Run, Run | None]:
    """Both over the blocks and switches that are compared; as they are if nothing is."""
    if base is None or run.failure or base.failure or (
            pair := decision.compared(run.result, base.result)) is None:
        return run, base
    return replace(run, result=pair[0]), replace(base, result=pair[1])


def quality_text(run: Run, label: str, unit: str) -> str:
    """What follows "PSNR: " and its siblings: the mean, and the worst frame where it is recorded."""
    if label == "PSNR" and lookup(run.result, "quality.identical") is True and not of_truth(run.result):
        return "infinite, all compared frames are identical"
    name = QUALITY.get(label, "st_lpips")
    text = run.text(label, f"quality.{name}.mean")
    worst = number(run.result, f"quality.{name}.{'max' if label in _DISTANCES else 'min'}")
    if text.startswith("n/a") or worst is None:
        return text if text.startswith("n/a") else text + unit
    return f"{text}{unit} (worst frame {digits(worst)}{unit})"


def quality_sentence(run: Run) -> str:
    """The free text of experiments 1 to 3."""
    if run.failure:
        return f"n/a ({run.outcome})"
    quality = run.result["quality"]
    if not quality.get("reference"):
        return f"Not compared: {sentence(lookup(quality, 'psnr_db.reason') or 'no reference')}"
    compared = f"{quality.get('frames_compared')} of {quality.get('frames_total')} frames compared"
    if of_truth(run.result):
        same = "Exact: the baseline's latents and frames, bit for bit. " if quality.get("identical") else ""
        return f"{same}{ratio_text(run.result)}; {', '.join(_frame_values(run))}, against " \
               f"{escape(quality['reference'])} ({compared}); {escape(quality.get('label'))}."
    if quality.get("identical") is True:
        return f"Exact: bit-identical to the baseline ({compared}); {escape(quality.get('label'))}."
    return (f"{', '.join(_frame_values(run))}, against the baseline ({compared}); "
            f"{escape(quality.get('label'))}.")


def _frame_values(run: Run) -> list[str]:
    return [f"{name} {quality_text(run, name, ' dB' if name == 'PSNR' else '')}" for name in QUALITY]


def of_truth(result: Result) -> bool:
    """Whether its fidelity is that of protocol 2, against the baseline in float32."""
    return lookup(result, "quality.protocol") == 2


def ratio_text(result: Result) -> str:
    """The error ratios over all blocks and of the worst block, free-running and teacher-forced."""
    parts = []
    for name, path in (("free-running", "quality.free_running"), ("teacher-forced", "quality")):
        ratio, error = lookup(result, f"{path}.error_ratio"), number(result, f"{path}.latent_error.all")
        if error is None:
            parts.append(f"{name} n/a")
        elif is_na(ratio):
            parts.append(f"{name} n/a (latent error {error:.2g})")
        else:
            parts.append(f"{name} {ratio['all']:.3g} (worst block {ratio['worst']:.3g}; latent error "
                         f"{100 * error:.3g} %)")
    return f"Error ratio {', '.join(parts)}"


def null_notes(result: Result) -> list[str]:
    """What the null rows of a campaign's baseline show: the scale of every error ratio."""
    rows = lookup(result, "quality.nulls") or []
    told = []
    for row in rows:
        if (ratio := number(row, "worst_ratio")) is None:
            told.append(f"{row['title']} n/a")
            continue
        psnr, worst = (number(row, f"free_running.psnr_db.{key}") for key in ("mean", "min"))
        told.append(f"{row['title']} {ratio:.3g} (PSNR {digits(psnr)} dB, worst frame {digits(worst)})")
    return [f"Null rows, the baseline's stream with something taken away, by the greater of their two error "
            f"ratios: {escape('; '.join(told))}."] if told else []


def psnr_within_blocks(result: Result) -> tuple[float, float] | None:
    """Mean PSNR of the first and of the last frame of the blocks after the first; None where not every frame
    of a whole number of blocks was compared, or some are identical.
    """
    values, size = lookup(result, "quality.psnr_db.per_frame") or [], result["sizes"]["frames_per_block"]
    later = values[len(values) % size:]
    whole = lookup(result, "quality.frames_compared") == lookup(result, "quality.frames_total")
    if not whole or not later or not all(map(is_finite, values)):
        return None
    firsts, lasts = later[::size], later[size - 1::size]
    return math.fsum(firsts) / len(firsts), math.fsum(lasts) / len(lasts)


def worst_ms(run: Run, blocks: int) -> float:
    """SS max, in ms per video frame, over the first `blocks` steady-state blocks."""
    return max(numbers(run.result, "latency.ss_block_ms")[:blocks]) / run.result["sizes"]["frames_per_block"]


def quality_short(run: Run) -> str:
    """Fidelity in two words."""
    if lookup(run.result, "quality.identical") is True:
        return "exact"
    text = run.text("PSNR", "quality.psnr_db.mean")
    ratio = number(run.result, "quality.worst_ratio")
    return text if text.startswith("n/a") else f"PSNR {text} dB" if ratio is None else \
        f"error ratio {ratio:.3g}, PSNR {text} dB"


def fidelity_of(run: Run) -> float:
    """The higher the closer: minus the error ratio, which is 1 of what has the baseline's bits; for results
    from before protocol 2 the PSNR to the baseline, infinite if identical. Below all else if unknown.
    """
    if of_truth(run.result):
        same = run.preset == BASELINE or lookup(run.result, "quality.identical") is True
        ratio = 1.0 if same else number(run.result, "quality.worst_ratio")
        return float("-inf") if ratio is None else -ratio
    if run.preset == BASELINE or lookup(run.result, "quality.identical") is True:
        return float("inf")
    psnr = number(run.result, "quality.psnr_db.mean")
    return float("-inf") if psnr is None else psnr


def objective_of(run: Run) -> str:
    """What its decision looks at: latency, switch or memory."""
    return lookup(run.result, "decision.gate.objective") or "latency"


def is_kept(run: Run) -> bool:
    """Whether its decision is Keep; the baseline needs none, and a study is none to keep."""
    if run.preset == BASELINE:
        return True
    return lookup(run.result, "decision.keep") is True and not decision.is_study(run.result)


def is_large(result: Result) -> bool:
    """Whether it is the model that the hypotheses and the target speak of."""
    return model_name(result) == "longlive-1.3b"


def model_name(result: Result) -> str:
    """Escaped; that of the parameters where the run failed."""
    return escape(lookup(result, "model.name") or lookup(result, "parameters.model") or "unknown")
