"""Colours: of presets and stages, the same in every chart."""

import zlib

STAGE_COLOURS = {"text_encode": "#9467bd", "recache": "#e0a100", "denoise": "#3b75af", "decode": "#5aa469",
                 "copy_to_host": "#c06a9b", "other": "#b8b8b8"}
STAGES = tuple(STAGE_COLOURS)
PRESET_COLOURS = {  # apart from one another also without red or green receptors
    "baseline": "#4d4d4d", "cuda_graphs": "#d98b00", "static_kv": "#3d9ad1", "async_vae": "#009e73",
    "quality": "#0a5c9c", "balanced": "#b4508f", "speed": "#d1491b", "low_memory": "#662200",
    "realtime": "#2318f0", "ablation": "#8866ff", "realtime_8gb": "#6e7f00",
    "compile_parts": "#e377c2"}
DARK, GREY, RED = "#222222", "#8a8a8a", "#c21f1f"
_MORE_COLOURS = ("#e7298a", "#455a8f", "#a6761d", "#2f6b3a", "#9c6ade", "#b3562b")
_ON_LIGHT = ("recache", "other")  # stages whose colour is too light for white figures


def colour_of(preset: str) -> str:
    """The preset's colour; a preset that the table does not name gets one that depends on its name only."""
    spare = _MORE_COLOURS[zlib.crc32(preset.encode()) % len(_MORE_COLOURS)]
    return PRESET_COLOURS.get(preset, spare)


def stage_colour(stage: str) -> str:
    return STAGE_COLOURS.get(stage, STAGE_COLOURS["other"])


def ink_on(stage: str) -> str:
    """The colour of figures on a stage's bar."""
    return DARK if stage in _ON_LIGHT else "white"
