"""Measurements of LongLive-1.3B on one H100 by others, with sources. Log and README take them from here."""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_PER_BLOCK = 12


@dataclass(frozen=True)
class Outside:
    """A measurement of other code: `denoise_ms` and `decode_ms` per block of 12 video frames if known, and
    `stated_fps` as published.
    """

    who: str
    denoise_ms: float | None = None
    decode_ms: float | None = None
    stated_fps: float | None = None
    remark: str = ""

    def sentence(self) -> str:
        """As in `upstream's code: 491 + 278 ms per block, 15.6 FPS (LoRA merged)`."""
        words = [f"{self.stated_fps:g} FPS"] if self.stated_fps else []
        if self.denoise_ms and self.decode_ms:
            total = self.denoise_ms + self.decode_ms
            words = [f"{self.denoise_ms:g} + {self.decode_ms:g} ms per block (denoising, VAE)",
                     f"{1e3 * FRAMES_PER_BLOCK / total:.1f} FPS"]
        elif self.denoise_ms:
            words = [f"{self.denoise_ms:g} ms per block without the VAE"]
        return f"{self.who}: {', '.join(words)}{f' ({self.remark})' if self.remark else ''}"


MEASURED = (
    Outside("LongLive's paper (arXiv:2509.22622, Table 1)", stated_fps=20.7,
            remark="apparently without the VAE"),
    Outside("a third party's profile", denoise_ms=519),
    Outside("upstream's own code on our machine, LoRA merged", denoise_ms=491, decode_ms=278),
    Outside("the same, LoRA unmerged, as it ships", denoise_ms=536, decode_ms=276),
)
WHY_OURS_DIFFER = (
    "Our times include the VAE and the copy of the frames to host memory. They are read from the host clock, "
    "synchronised at each block. Our LoRA is merged, and our baseline uses cuDNN's attention.")


def sentences() -> list[str]:
    """The measurements of others, and why our numbers differ."""
    found = "; ".join(measured.sentence() for measured in MEASURED)
    return [f"Measurements of LongLive-1.3B on one H100 by others: {found}. {WHY_OURS_DIFFER}"]
