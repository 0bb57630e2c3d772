"""Small HTML for the reprs in a notebook: facts as a table, a block's frames as a clip. PIL is imported at
its first use.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from torch import Tensor

PREVIEW_FPS = 16
MAX_WIDTH = 320


def facts_html(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of (name, value) under a title, all escaped."""
    cells = "".join(f'<tr><td style="text-align:left">{html.escape(name)}</td>'
                    f'<td style="text-align:left">{html.escape(value)}</td></tr>' for name, value in rows)
    return f"<b>{html.escape(title)}</b><table>{cells}</table>"


def clip_html(frames: Tensor, caption: str = "") -> str:
    """Return HTML with a clip of `frames`, uint8 [T, 3, H, W] on any device, at `PREVIEW_FPS` and
    at most `MAX_WIDTH` pixels wide; the caption is escaped.
    """
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).cpu().numpy()]
    width, height = pictures[0].size
    if width > MAX_WIDTH:
        size = MAX_WIDTH, max(1, round(height * MAX_WIDTH / width))
        pictures = [picture.resize(size) for picture in pictures]
    data = io.BytesIO()
    pictures[0].save(data, "WEBP", save_all=True, append_images=pictures[1:], loop=0, quality=80,
                     duration=round(1000 / PREVIEW_FPS))
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    words = html.escape(caption)
    return (f'<figure><img alt="{words}" src="data:image/webp;base64,{encoded}" style="min-width:128px">'
            f"<figcaption>{words}</figcaption></figure>")
