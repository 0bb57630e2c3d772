"""Turn frames into an mp4, a contact sheet or inline HTML. For viewing only: metrics use the raw frames.

numpy, PIL and PyAV are imported where they are needed. PyAV brings its own x264, so no system ffmpeg is used.
"""

import base64
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import atomic_path
from .charts import Chart

if TYPE_CHECKING:
    import numpy as np
    import torch

_LABEL_HEIGHT = 14
SIDE_CRF, SIDE_PIXELS, SIDE_BYTES = 18, 240, 3_000_000
"""Of the comparison of two videos: its quality, the most pixels a side, and the most bytes of the file."""
AMPLIFIED = 8
BT709, LIMITED_RANGE = 1, 1
"""FFmpeg's codes. An mp4 is converted by BT.709 and says so; without it players guess the matrix."""


def as_images(frames: "torch.Tensor | np.ndarray") -> "np.ndarray":
    """uint8 [T,H,W,3] or [T,3,H,W], tensor (any device) or array -> uint8 array [T,H,W,3].

    Raises UserError for another dtype or shape, or if there is no frame.
    """
    import numpy as np

    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    if array.dtype != np.uint8:
        raise UserError(f"frames: dtype {array.dtype}; give uint8, (frames * 255).to(torch.uint8) for 0..1.")
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]) or array.shape[0] == 0:
        raise UserError(f"frames: shape {list(array.shape)}; give [T,H,W,3] or [T,3,H,W], T > 0.")
    return array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)


def shrink(frames: "torch.Tensor", width: int | None) -> "torch.Tensor":
    """Average a uint8 tensor [T,3,H,W] down to `width` pixels; keep the shape, height even.

    Returns the frames unchanged if `width` is None or at least W.
    """
    import torch

    if width is None or width >= frames.shape[3]:
        return frames
    height = max(2, round(frames.shape[2] * width / frames.shape[3] / 2) * 2)
    return torch.cat(
        [
            torch.nn.functional.interpolate(part.float(), (height, width), mode="area").round().byte()
            for part in frames.split(16)
        ]
    )


def write_mp4(path: str | Path, frames: "torch.Tensor | np.ndarray", fps: float, *,
              crf: int = 20) -> dict[str, Any]:
    """Write frames (see `as_images`) as H.264 for browsers: yuv420p by BT.709, index in front, even sizes.

    4:2:0 needs even sizes. An odd height or width repeats its last row or column, and `padded` records it.
    Returns {frames, fps, width, height, padded, bytes}. Raises UserError without PyAV or if writing fails.
    """
    images = as_images(frames)
    size = write_pictures(path, images, fps, crf=crf)
    return {"frames": len(images), "fps": fps, **size, "bytes": Path(path).stat().st_size}


def write_pictures(path: str | Path, pictures: "Iterable[np.ndarray]", fps: float, *,
                   crf: int = 20) -> dict[str, Any]:
    """`write_mp4` for pictures, each uint8 [H,W,3] and of the same size, that arrive one by one and need not
    fit into memory together. Returns {width, height, padded}. Raises UserError as `write_mp4` does, or if
    there is no picture.
    """
    import numpy as np

    try:
        import av
    except ImportError as error:
        raise UserError("writing mp4 needs PyAV, which is not installed: pip install 'av>=14'.") from error
    if fps <= 0:
        raise UserError(f"fps: {fps} must be greater than 0.")
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise UserError("frames: no frame was given; give at least one.")
    odd = [size % 2 for size in first.shape[:2]]
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = first.shape[0] + odd[0], first.shape[1] + odd[1]
            stream.pix_fmt = "yuv420p"
            coder = stream.codec_context
            coder.colorspace = coder.color_primaries = coder.color_trc = BT709
            coder.color_range = LIMITED_RANGE
            stream.options = {"crf": str(crf)}
            for picture in itertools.chain([first], pictures):
                padded = np.pad(picture, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return {"width": first.shape[1] + odd[1], "height": first.shape[0] + odd[0], "padded": any(odd)}


def contact_sheet(path: str | Path, frames: "torch.Tensor | np.ndarray", *, columns: int = 4,
                  labels: Sequence[str] | None = None, max_width: int = 1600) -> None:
    """Write frames (see `as_images`) as one PNG grid, row by row, with an optional label above each.

    Frames are scaled down so that the sheet is at most `max_width` pixels wide. Labels are cut to the width
    of their cell. Raises UserError for a wrong number of labels or columns, or if writing fails.
    """
    from PIL import Image, ImageDraw

    images = as_images(frames)
    if columns < 1 or (labels is not None and len(labels) != len(images)):
        raise UserError(f"contact sheet: {columns} columns and {len(labels or ())} labels for {len(images)} "
                        "frames; give at least one column, and one label per frame or none.")
    columns = min(columns, len(images))
    height, width = images.shape[1:3]
    cell_width = max(1, min(width, max_width // columns))
    image_height = max(1, round(height * cell_width / width))
    head = 0 if labels is None else _LABEL_HEIGHT
    cell_height = image_height + head
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = index % columns * cell_width, index // columns * cell_height
        if labels is not None:
            draw.text((x + 2, y + 1), _fit(draw, labels[index], cell_width - 4), fill="black")
        sheet.paste(Image.fromarray(image).resize((cell_width, image_height)), (x, y + head))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _fit(draw: Any, label: str, width: int) -> str:
    """`label` on one line, cut to fit. Characters that the built-in font may lack become '?'."""
    text = " ".join(label.split()).encode("latin-1", "replace").decode("latin-1")
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def video_html(path: str | Path, caption: str = "", min_width: int = 256,
               sheet: str | Path | None = None) -> str:
    """HTML with the mp4 embedded, for `IPython.display.HTML` and for reports. The caption is escaped.

    On paper a report shows a picture instead: `sheet`, a PNG such as the contact sheet, or the first frame.

    In a player narrower than `min_width` pixels the controls would hide the tiny model's pictures. `src` is
    on <video> itself because JupyterLab strips it from <source> in untrusted notebooks, such as those that
    papermill ran. Raises UserError if the file cannot be read.
    """
    path = Path(path)
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        paper = "" if sheet is None else base64.b64encode(Path(sheet).read_bytes()).decode("ascii")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; write the video first.") from error
    style = f"min-width:min({min_width}px,100%);max-width:100%"
    first = _first_frame(path)
    poster = f' poster="{first}"' if first else ""
    source = f"data:video/mp4;base64,{data}"
    player = f'<video controls loop muted{poster} src="{source}" style="{style}"></video>'
    if paper:
        first = f"data:image/png;base64,{paper}"
    # Hidden here and not by a style sheet, since JupyterLab has none for it.
    picture = f'<img class="on-paper" style="display:none" alt="frames of the video" src="{first}">'
    words = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure>{player}{picture if first else ''}{words}</figure>"


def _first_frame(path: Path) -> str:
    """The first frame of an mp4 as the address of a JPEG; empty if it has none."""
    import av

    try:
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0)).to_image()
    except (av.FFmpegError, StopIteration):
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference_heatmap(reference: "torch.Tensor | np.ndarray", variant: "torch.Tensor | np.ndarray",
                       full_scale: float = 0.1) -> "np.ndarray":
    """uint8 [H,W,3] colour map of the mean absolute difference over time and channels of two clips [T,3,H,W].

    The brightest colour means `full_scale` of the value range or more. The scale is fixed so that presets
    remain comparable.
    """
    import numpy as np
    from matplotlib import colormaps

    left, right = _pair(reference, variant)
    total = sum(np.abs(a.astype(np.int16) - b).sum(-1) for a, b in zip(left, right))
    share = total / (255 * 3 * len(left)) / full_scale
    return (colormaps["inferno"](share.clip(0, 1))[..., :3] * 255).astype(np.uint8)


def side_by_side(reference: "torch.Tensor | np.ndarray",
                 variant: "torch.Tensor | np.ndarray") -> "np.ndarray":
    """uint8 [T,H,3W+8,3] from two uint8 clips: the reference, the variant, and `AMPLIFIED` times their
    difference, grey where there is none; white gaps between.
    """
    import numpy as np

    left, right = _pair(reference, variant)
    difference = np.stack([b.astype(np.int16) - a for a, b in zip(left, right)])
    amplified = (128 + AMPLIFIED * difference).clip(0, 255).astype(np.uint8)
    gap = np.full((*left.shape[:2], 4, 3), 255, np.uint8)
    return np.concatenate([left, gap, right, gap, amplified], axis=2)


def side_by_side_mp4(path: str | Path, reference: "torch.Tensor | np.ndarray",
                     variant: "torch.Tensor | np.ndarray", fps: float) -> str:
    """Write two uint8 clips [T,3,H,W] next to each other and their amplified difference, unscaled and at
    `SIDE_CRF`, so that compression hides nothing. Returns what it shows, for a caption.

    Large pictures are cut to `SIDE_PIXELS` around the place where the clips differ most, long or noisy clips
    to their last frames, so that the file has at most `SIDE_BYTES`.
    """
    left, right = _pair(reference, variant)
    total, height, width = left.shape[:3]
    rows, columns = _where_most(left, right)
    left, right = left[:, rows, columns], right[:, rows, columns]
    shown = total
    while True:
        written = write_mp4(path, side_by_side(left[-shown:], right[-shown:]), fps, crf=SIDE_CRF)
        if written["bytes"] <= SIDE_BYTES or shown == 1:
            break
        shown = max(1, int(0.9 * shown * SIDE_BYTES / written["bytes"]))
    words = [f"{AMPLIFIED} times the difference, grey where there is none"]
    if left.shape[1:3] != (height, width):
        words.append(f"pixels {columns.start} to {columns.stop} of {width} across and {rows.start} to "
                     f"{rows.stop} of {height} down, where they differ most")
    if shown < total:
        words.append(f"the last {shown} of {total} frames")
    return "; ".join(words)


def _where_most(left: "np.ndarray", right: "np.ndarray") -> tuple[slice, slice]:
    """Rows and columns of the window of at most `SIDE_PIXELS` pixels a side with the largest difference."""
    import numpy as np

    total = sum(np.abs(a.astype(np.int16) - b).sum(-1) for a, b in zip(left, right)).astype(np.int64)
    size = [min(SIDE_PIXELS, side) for side in total.shape]
    sums = np.pad(total, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[size[0]:, size[1]:] - sums[:-size[0], size[1]:] - sums[size[0]:, :-size[1]] \
        + sums[:-size[0], :-size[1]]
    row, column = (int(at) for at in np.unravel_index(windows.argmax(), windows.shape))
    return slice(row, row + size[0]), slice(column, column + size[1])


def difference_chart(reference: "torch.Tensor | np.ndarray",
                     variant: "torch.Tensor | np.ndarray") -> Chart:
    """The last frame of each of two clips, uint8 [T, 3, H, W], and their mean absolute difference."""
    chart = Chart(figsize=(9, 2.6), layout="constrained")
    pictures = {"baseline, last frame": as_images(reference[-1:])[0],
                "this run, last frame": as_images(variant[-1:])[0],
                "mean difference (white: 10 % and more)": difference_heatmap(reference, variant)}
    for ax, (title, picture) in zip(chart.subplots(1, 3), pictures.items()):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_axis_off()
    return chart


def _pair(reference: "torch.Tensor | np.ndarray",
          variant: "torch.Tensor | np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    left, right = as_images(reference), as_images(variant)
    if left.shape != right.shape:
        raise UserError(f"clips: shapes {list(left.shape)} and {list(right.shape)} differ.")
    return left, right
