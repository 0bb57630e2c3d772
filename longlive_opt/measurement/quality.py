"""How far a preset's frames are from a reference: PSNR (peak signal-to-noise ratio), SSIM and MS-SSIM
(structural similarity, MS: multi-scale), LPIPS and ST-LPIPS (learned perceptual distance, ST:
shift-tolerant), and the change of CLIP score.

These metrics measure deviation, not beauty. Autoregressive video diverges chaotically, so curves per frame
say more than the mean. With random weights they only measure numerical fidelity. Weights of LPIPS and CLIP
are only read from this machine; a missing metric becomes n/a with the command that fetches its weights.
ST-LPIPS (arXiv:2207.13686) has its weights in its package and needs no other file.

All arithmetic is float32 on frames in 0..1 without TF32, because SSIM subtracts nearly equal numbers.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, short
from .result import is_na, na

if TYPE_CHECKING:
    import numpy as np
    import torch

METRICS = ("psnr_db", "ssim", "ms_ssim", "lpips", "st_lpips", "clip_delta")
CLIP_MODELS = ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32",
               "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336")
# In pixels: the kernel, the kernel 4 scales down, AlexNet.
_LEAST_SIZE = {"ssim": 11, "ms_ssim": 176, "lpips": 32, "st_lpips": 32}
_FALLING = ("lpips", "st_lpips")  # distances: 0 is equal
ST_LPIPS_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
LPIPS_TRUNK = "alexnet-owt-7be5be79.pth"
_FETCH_TRUNK = ('fetch it once: python -c "from torchvision.models import AlexNet_Weights as W; '
                'W.DEFAULT.get_state_dict(check_hash=True)"')
_BATCH = 4


def compare(reference: "torch.Tensor | np.ndarray", variant: "torch.Tensor | np.ndarray", *,
            weights_kind: str, reference_name: str = "baseline", max_frames: int | None = None,
            prompts: str | Sequence[str] | None = None, lpips_folder: str | Path | None = None,
            clip_model: str = CLIP_MODELS[0], metrics: Sequence[str] = METRICS,
            device: "torch.device | str | None" = None) -> dict[str, Any]:
    """The `quality` section of result.json for two clips [T,3,H,W] of one dtype: uint8, or float in 0..1.

    Computed on `device`, by default the reference's, a few frames at a time. `identical` covers all frames;
    the other metrics cover at most `max_frames` of them, evenly spaced (`frame_indices`). `prompts`: one for
    all frames, or one per frame, for the CLIP score. `lpips_folder`: the folder with the AlexNet trunk, by
    default torch's hub cache. `metrics`: the metrics to compute; the section omits the others.

    A metric is {mean, min, max, per_frame, worst_frame}. A frame equal to its reference has PSNR null, and
    the mean is over the others; identical clips have no PSNR. `flags` lists problems that invalidate the
    numbers, such as constant frames: a broken decoder's black frames match black frames perfectly.

    Raises UserError for unequal lengths, sizes or dtypes, non-finite frames, or values outside 0..1.
    """
    import torch

    reference, variant = _as_clip(reference, "reference"), _as_clip(variant, "variant")
    if reference.shape != variant.shape or reference.dtype != variant.dtype:
        raise UserError(f"clips: the reference is {list(reference.shape)} {reference.dtype}, the variant "
                        f"{list(variant.shape)} {variant.dtype}; they must be equal.")
    total, size, device = len(reference), min(reference.shape[2:]), torch.device(device or reference.device)
    indices = _spread(total, max_frames)
    scorers: dict[str, Any] = {"psnr_db": _psnr, "ssim": _ssim, "ms_ssim": _ms_ssim}
    scorers = {name: scorer for name, scorer in scorers.items() if name in metrics}
    if "lpips" in metrics:
        scorers["lpips"] = _load_lpips(lpips_folder, device)
    if "st_lpips" in metrics:
        scorers["st_lpips"] = _load_st_lpips(device)
    for name, least in _LEAST_SIZE.items():
        if name in scorers and size < least:
            scorers[name] = na(f"frames of {size} pixels are too small for it", f"use {least} or more")
    values: dict[str, list[float]] = {name: [] for name, scorer in scorers.items() if not is_na(scorer)}
    identical = torch.equal(reference, variant.to(reference.device))
    constant = {"reference": 0, "variant": 0}
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for a, b in _batches(reference, variant, indices, device):
            for side, frames in (("reference", a), ("variant", b)):
                flat = frames.flatten(1)
                constant[side] += int((flat.amax(1) - flat.amin(1) < 0.5 / 255).sum())
            for name, scores in values.items():
                scores += [] if identical else scorers[name](b, a).tolist()
    flags = [f"{count} of {len(indices)} {side} frames are constant (black or empty output)"
             for side, count in constant.items() if count]
    section = {
        "reference": reference_name, "label": _label(weights_kind), "identical": identical, "flags": flags,
        "frames_compared": len(indices), "frames_total": total, "frame_indices": indices,
        **{name: scorer if is_na(scorer) else _summarise(name, values[name], indices, identical)
           for name, scorer in scorers.items()},
    }
    if "clip_delta" in metrics:
        section["clip_delta"] = _clip_delta(reference, variant, indices, prompts, clip_model, weights_kind,
                                            device)
    return section


def not_compared(reason: str, how_to_fix: str, weights_kind: str) -> dict[str, Any]:
    """Return a `quality` section without a comparison, such as the baseline's own."""
    return {"reference": None, "label": _label(weights_kind), "identical": None, "flags": [],
            "frames_compared": 0, "frames_total": 0} | {name: na(reason, how_to_fix) for name in METRICS}


def _label(weights_kind: str) -> str:
    random = weights_kind == "random"
    return "numerical fidelity with random weights" if random else "deviation from the baseline"


def _as_clip(frames: "torch.Tensor | np.ndarray", side: str) -> "torch.Tensor":
    import torch

    clip = torch.as_tensor(frames)
    if clip.ndim != 4 or clip.shape[1] != 3 or len(clip) == 0:
        raise UserError(f"{side}: shape {list(clip.shape)}; give a clip [T,3,H,W] with at least one frame.")
    if clip.dtype != torch.uint8 and not clip.is_floating_point():
        raise UserError(f"{side}: dtype {clip.dtype}; give uint8, or float in 0..1.")
    return clip


def _spread(total: int, most: int | None) -> list[int]:
    """At most `most` indices of `total`, evenly spaced, first and last included."""
    if most is not None and most < 1:
        raise UserError(f"max_frames: {most} must be at least 1.")
    if most is None or most >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(most - 1, 1)) for i in range(most)]


def _batches(reference: "torch.Tensor", variant: "torch.Tensor",
             indices: Sequence[int],
             device: "torch.device | None" = None) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Yield the chosen frames of both clips, checked, as float32 in 0..1 on `device` or the reference's."""
    device = device or reference.device
    for start in range(0, len(indices), _BATCH):
        chosen = list(indices[start:start + _BATCH])
        yield (_checked(reference[chosen].to(device), "reference", chosen),
               _checked(variant[chosen].to(device), "variant", chosen))


def _checked(frames: "torch.Tensor", side: str, indices: list[int]) -> "torch.Tensor":
    import torch

    if frames.dtype == torch.uint8:
        return frames.float() / 255
    frames = frames.float()
    broken = ~frames.isfinite().flatten(1).all(1)
    if broken.any():
        raise UserError(f"{side}: frame {indices[int(broken.nonzero()[0])]} has values that are not finite; "
                        "the decoder or a kernel is broken.")
    low, high = frames.min().item(), frames.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise UserError(f"{side}: values {low:.3g} to {high:.3g}; give frames in 0..1.")
    return frames


def _psnr(variant: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
    """PSNR in dB for a data range of 1, per frame; infinite for equal frames."""
    return -10 * (variant - reference).square().flatten(1).mean(1).log10()


def _ssim(variant: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(variant, reference, data_range=1.0, reduction="none")
    return scores.reshape(-1)


def _ms_ssim(variant: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    return ms_ssim(variant, reference, data_range=1.0, reduction="none").reshape(-1)


def _summarise(name: str, values: list[float], indices: list[int], identical: bool) -> dict[str, Any]:
    """Return mean, extremes and worst frame. Equal clips score without rounding; infinity is null."""
    if identical:
        values = [{"psnr_db": math.inf, **dict.fromkeys(_FALLING, 0.0)}.get(name, 1.0)] * len(indices)
    finite = {index: value for index, value in zip(indices, values, strict=True) if value != math.inf}
    summary: dict[str, Any] = {"per_frame": [finite.get(index) for index in indices]}
    if not finite:
        return summary | dict.fromkeys(("mean", "min", "max", "worst_frame"))
    pick = max if name in _FALLING else min
    return summary | {"mean": math.fsum(finite.values()) / len(finite), "min": min(finite.values()),
                      "max": max(finite.values()), "worst_frame": pick(finite, key=finite.get)}


def perceptual_metrics() -> dict[str, str]:
    """Perceptual metric -> why it is n/a on this machine, empty where it can be computed."""
    loaded = {"LPIPS": _load_lpips(None, "cpu"), "ST-LPIPS": _load_st_lpips("cpu")}
    return {name: f"n/a: {one['reason']}; {one['how_to_fix']}" if is_na(one) else ""
            for name, one in loaded.items()}


def _not_loaded(package: str, wanted: str, error: Exception) -> dict[str, Any]:
    """n/a because importing a package failed, whatever it raised: a torchvision of another build than torch
    raises RuntimeError.
    """
    if isinstance(error, ImportError):
        return na(f"the package {package} is not installed", f"pip install {wanted}")
    return na(f"the package {package} cannot be loaded ({short(str(error))})",
              "install the torchvision that belongs to this PyTorch, or run make install")


def _load_lpips(folder: str | Path | None,
                device: "torch.device") -> "Callable[..., torch.Tensor] | dict[str, Any]":
    """Return a scorer (variant, reference) -> LPIPS per frame, or n/a if no trunk has the right hash."""
    import torch

    path = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / LPIPS_TRUNK
    if not path.is_file():
        return na(f"the AlexNet trunk {LPIPS_TRUNK} is not on this machine", _FETCH_TRUNK)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not path.stem.endswith(digest[:8]):
        return na(f"the SHA-256 of {LPIPS_TRUNK} starts with {digest[:8]}, not as its name says",
                  f"delete it, then {_FETCH_TRUNK}")
    try:
        import lpips
    except Exception as error:
        return _not_loaded("lpips", "lpips==0.1.4", error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with a deprecated keyword
        # A random trunk first: otherwise lpips would download a trunk, or load an unchecked one.
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in model.net.named_modules():
        if name.startswith("slice") and "." in name:  # "slice2.3" is layer 3 of AlexNet's features
            layer = name.split(".")[1]
            module.load_state_dict({key: trunk[f"features.{layer}.{key}"] for key in module.state_dict()})
    model = model.to(device)
    return lambda variant, reference: model(variant, reference, normalize=True).reshape(-1)


def _load_st_lpips(device: "torch.device") -> "Callable[..., torch.Tensor] | dict[str, Any]":
    """Return a scorer (variant, reference) -> ST-LPIPS per frame with the package's shift-tolerant AlexNet,
    or n/a without the package.

    Only the network comes from the package. The package's class for the metric needs another package that it
    does not declare, and reads its weights with a `torch.load` that may run code.
    """
    import torch
    from torch.nn import functional as F

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from stlpips_pytorch import invariant_networks
    except Exception as error:
        return _not_loaded("stlpips_pytorch", "stlpips_pytorch==0.0.2", error)
    path = Path(invariant_networks.__file__).parent / ST_LPIPS_WEIGHTS
    stored = torch.load(path, map_location="cpu", weights_only=True)
    network = invariant_networks.alexnet(variant="shift_tolerant", filter_size=3)
    network.load_state_dict({name.removeprefix("net."): value for name, value in stored.items()
                             if name.startswith("net.")})
    network = network.to(device).eval().requires_grad_(False)
    shift, scale = (stored[f"scaling_layer.{name}"].to(device) for name in ("shift", "scale"))
    weights = [stored[f"lin{layer}.model.1.weight"].to(device) for layer in range(5)]

    def features(frame: "torch.Tensor") -> "list[torch.Tensor]":
        return [F.normalize(part, dim=1, eps=1e-10) for part in network((2 * frame - 1 - shift) / scale)]

    def score(variant: "torch.Tensor", reference: "torch.Tensor") -> "torch.Tensor":
        # One frame at a time: the first layer has 64 channels at full picture size.
        return torch.stack([
            sum(F.conv2d((a - b).square(), weight).mean()
                for a, b, weight in zip(features(ours[None]), features(theirs[None]), weights, strict=True))
            for ours, theirs in zip(variant, reference, strict=True)])

    return score


def _clip_delta(reference: "torch.Tensor", variant: "torch.Tensor", indices: list[int],
                prompts: str | Sequence[str] | None, name: str, weights_kind: str,
                device: "torch.device") -> dict[str, Any]:
    """{mean, reference, variant, model}: CLIP score (0 to 100), variant minus reference; or n/a."""
    if name not in CLIP_MODELS:  # other names can run code from the model's repository
        raise UserError(f"clip_model: {name!r} is not allowed; choose one of {', '.join(CLIP_MODELS)}.")
    if weights_kind == "random":
        return na("random weights: the frames do not show the prompt", "run with official weights")
    if prompts is None:
        return na("no prompt was given", "pass the prompts of the frames")
    texts = [prompts] * len(reference) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(reference):
        raise UserError(f"prompts: {len(texts)} for {len(reference)} frames; give one, or one per frame.")
    loaded = _load_clip(name, device)
    if is_na(loaded):
        return loaded
    texts = [texts[index] for index in indices]
    scores = {"reference": _clip_score(loaded, reference[indices], texts),
              "variant": _clip_score(loaded, variant[indices], texts)}
    return {"mean": scores["variant"] - scores["reference"], **scores, "model": name}


def _load_clip(name: str, device: "torch.device") -> Any:
    """(model, processor) from local files, or n/a."""
    try:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(name, local_files_only=True).to(device).eval()
        return model, CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = "is not on this machine" if isinstance(error, OSError) else "cannot be read"
        return na(f"the CLIP model {name} {reason}", f"fetch it once: hf download {name}")
    except Exception as error:
        return _not_loaded("transformers", "transformers", error)


def _clip_score(loaded: tuple[Any, Any], frames: "torch.Tensor", texts: list[str]) -> float:
    """Mean of 100 x cosine between image and text, at least 0 (the CLIP score). Prompts are cut at 77 tokens.

    Does not use torchmetrics' `clip_score`: 1.9 fails on the return value of transformers 5's
    get_image_features.
    """
    import torch

    model, processor = loaded
    images = [(frame * 255 if frame.is_floating_point() else frame).to(torch.uint8).cpu() for frame in frames]
    total = 0.0
    with torch.inference_mode():
        for image, text in zip(images, texts, strict=True):
            inputs = processor(text=[text], images=[image], return_tensors="pt", truncation=True)
            output = model(**inputs.to(model.device))
            total += torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).item()
    return max(100 * total / len(images), 0.0)
