"""Claims about mp4, contact sheets and inline HTML."""

import base64
import builtins
import errno
import io
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longlive_opt.errors import UserError
from longlive_opt.files import load_yaml
from longlive_opt.report import video
from longlive_opt.report.html_export import MAX_BYTES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def frames():
    """uint8 [6,48,64,3], a bright square that moves over a gradient."""
    images = np.zeros((6, 48, 64, 3), np.uint8)
    images[..., 1] = np.linspace(0, 200, 64, dtype=np.uint8)
    for index in range(6):
        images[index, 10:30, 5 + 6 * index:25 + 6 * index] = (220, 60, 40)
    return images


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_mp4_plays_back_what_was_written(frames, tmp_path):
    """Would catch: swapped channels, a lost last frame (encoder not flushed), a wrong rate."""
    info = video.write_mp4(tmp_path / "video.mp4", frames, 16)
    stream, back = decoded(tmp_path / "video.mp4")
    assert back.shape == frames.shape and stream.average_rate == 16
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert info == {"frames": 6, "fps": 16, "width": 64, "height": 48, "padded": False,
                    "bytes": (tmp_path / "video.mp4").stat().st_size}
    assert os.listdir(tmp_path) == ["video.mp4"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (20, 90, 200), (255, 255, 255), (0, 0, 0)])
def test_colours_come_back_by_the_tags(tmp_path, colour):
    """Would catch: an mp4 that names no matrix, or another than it was converted by, so that each player
    shows another red. Decoded here by the formula of BT.709, with no help of a library.
    """
    video.write_mp4(tmp_path / "video.mp4", np.full((3, 48, 64, 3), colour, np.uint8), 16, crf=1)
    with av.open(str(tmp_path / "video.mp4")) as container:
        coder = container.streams.video[0].codec_context
        assert (coder.colorspace, coder.color_primaries, coder.color_trc, coder.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
    y, u, v = (np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[8, 8].astype(float)
               for plane in frame.planes)
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    red, blue = y + 2 * (1 - 0.2126) * v, y + 2 * (1 - 0.0722) * u
    shown = [red, (y - 0.2126 * red - 0.0722 * blue) / 0.7152, blue]
    assert np.abs(255 * np.clip(shown, 0, 1) - colour).max() <= 3
    back = frame.to_ndarray(format="rgb24", src_colorspace=1, src_color_range=1)[8, 8].astype(int)
    assert np.abs(back - colour).max() <= 3


def test_the_index_comes_first(frames, tmp_path):
    """Would catch: a file that plays only after the whole of it was loaded."""
    video.write_mp4(tmp_path / "video.mp4", frames, 25.0)
    data = (tmp_path / "video.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_are_padded_and_said(frames, tmp_path):
    """Would catch: x264's bare "Generic error in an external library" for 4:2:0 with odd sizes."""
    info = video.write_mp4(tmp_path / "video.mp4", frames[:, :47, :63], 16)
    assert (info["height"], info["width"], info["padded"]) == (48, 64, True)
    assert decoded(tmp_path / "video.mp4")[1].shape == (6, 48, 64, 3)


def test_channels_first_tensors_are_the_same_frames(frames):
    """Would catch: height taken for channels when a session's [T,3,H,W] is written."""
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert (video.as_images(tensor) == frames).all()


@pytest.mark.parametrize("change", [lambda f: f.astype(np.float32), lambda f: f[0], lambda f: f[:0],
                                    lambda f: f[..., :2], lambda f: f[None]])
def test_other_arrays_are_refused(frames, tmp_path, change):
    """Would catch: float frames in 0..1 cast to a black video."""
    with pytest.raises(UserError, match="frames"):
        video.write_mp4(tmp_path / "video.mp4", change(frames), 16)
    assert os.listdir(tmp_path) == []


def test_without_av_the_remedy_is_named(frames, tmp_path, monkeypatch):
    """Would catch: an ImportError in the last cell of an hour-long run."""
    real = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match="pip install"):
        video.write_mp4(tmp_path / "video.mp4", frames, 16)


def test_a_failed_write_leaves_nothing(frames, tmp_path, monkeypatch):
    """Would catch: half an mp4 beside a result, or the previous one destroyed."""
    (tmp_path / "video.mp4").write_bytes(b"old")
    real, calls = np.ascontiguousarray, []

    def full_at_the_third(image):
        calls.append(image)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(image)

    monkeypatch.setattr(np, "ascontiguousarray", full_at_the_third)
    with pytest.raises(UserError, match="No space left"):
        video.write_mp4(tmp_path / "video.mp4", frames, 16)
    assert os.listdir(tmp_path) == ["video.mp4"] and (tmp_path / "video.mp4").read_bytes() == b"old"


def test_contact_sheet_is_a_labelled_grid(frames, tmp_path):
    """Would catch: frames in column order, the last row cut off, or a label that ends the run."""
    labels = ["0", "1 a label far too long for its narrow cell", "2 🦊 <b>", "3\nnew line", "", "5"]
    video.contact_sheet(tmp_path / "frames.png", frames, columns=4, labels=labels)
    sheet = np.asarray(Image.open(tmp_path / "frames.png"))
    assert sheet.shape == (2 * (48 + 14), 4 * 64, 3)
    assert (sheet[14:62, 64:128] == frames[1]).all() and (sheet[76:124, :64] == frames[4]).all()
    video.contact_sheet(tmp_path / "small.png", frames, columns=9, max_width=60)
    assert Image.open(tmp_path / "small.png").size == (60, 8)
    for options in ({"columns": 0}, {"labels": ["one"]}):
        with pytest.raises(UserError, match="contact sheet"):
            video.contact_sheet(tmp_path / "frames.png", frames, **options)


def test_video_html_survives_an_untrusted_notebook(frames, tmp_path):
    """Would catch: `src` on <source>, which JupyterLab strips; a caption that is markup."""
    video.write_mp4(tmp_path / "video.mp4", frames, 16)
    text = video.video_html(tmp_path / "video.mp4", 'A <script>alert("x")</script> & fox')
    assert "<source" not in text and "<script>" not in text and "http" not in text
    assert "&lt;script&gt;" in text and "&amp; fox" in text
    data = text.split("video/mp4;base64,")[1].split('"')[0]
    assert base64.b64decode(data) == (tmp_path / "video.mp4").read_bytes()
    with pytest.raises(UserError, match="cannot read"):
        video.video_html(tmp_path / "missing.mp4")


def test_paper_shows_a_picture_instead_of_a_video(frames, tmp_path):
    """Would catch: black boxes in a printed report."""
    video.write_mp4(tmp_path / "video.mp4", frames, 16)
    video.contact_sheet(tmp_path / "frames.png", frames)
    alone = video.video_html(tmp_path / "video.mp4")
    poster = alone.split('poster="')[1].split('"')[0]
    picture = Image.open(io.BytesIO(base64.b64decode(poster.partition(",")[2])))
    assert picture.size == (64, 48) and alone.count(poster) == 2
    sheet = video.video_html(tmp_path / "video.mp4", sheet=tmp_path / "frames.png")
    shown = sheet.split('class="on-paper"')[1].split("base64,")[1].split('"')[0]
    assert base64.b64decode(shown) == (tmp_path / "frames.png").read_bytes()


def test_side_by_side_shows_the_difference_within_its_size(tmp_path, monkeypatch):
    """Would catch: a difference that compression hides, a crop where nothing differs, a report of 20 MB."""
    assert video.SIDE_CRF <= 18
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (12, 3, 64, 300), generator=generator, dtype=torch.uint8)
    variant = clip.clone()
    variant[:, :, 20:30, 280:290] = clip[:, :, 20:30, 280:290] // 2 + 60
    words = video.side_by_side_mp4(tmp_path / "a.mp4", clip, variant, 16)
    stream, pictures = decoded(tmp_path / "a.mp4")
    assert pictures.shape == (12, 64, 3 * 240 + 8, 3) and "12 frames" not in words
    first = int(re.search(r"pixels (\d+) to (\d+) of 300 across and 0 to 64 of 64 down", words)[1])
    assert 50 <= first <= 60
    third = pictures[:, :, 488:].astype(int)
    assert abs(third[:, 40:, :200] - 128).max() < 40, "grey where nothing differs"
    assert third[:, 20:30, 280 - first:290 - first].std() > 40
    size = (tmp_path / "a.mp4").stat().st_size
    monkeypatch.setattr(video, "SIDE_BYTES", size // 2)
    words = video.side_by_side_mp4(tmp_path / "b.mp4", clip, variant, 16)
    assert (tmp_path / "b.mp4").stat().st_size <= size // 2
    count = int(re.search(r"the last (\d+) of 12 frames", words)[1])
    assert 1 < count < 7 and len(decoded(tmp_path / "b.mp4")[1]) == count


def test_a_report_of_noise_can_be_mailed(tmp_path):
    """Would catch: a report of more than 8 MB from random weights, whose video compresses worst."""
    profile = load_yaml(ROOT / "params/profiles/h100.yaml")
    count, measured = 4 * profile["video_latent_frames"] - 3, 8
    noise = torch.randint(0, 256, (measured, 3, 480, 832), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    small = video.shrink(noise, profile["video_width"])
    one = video.write_mp4(tmp_path / "v.mp4", small, 16, crf=profile["video_crf"])["bytes"] * count / measured
    charts = 15 * 100_000  # outputs/h100: 0.05 to 0.09 MB each
    styles_and_tables = 300_000
    assert 4 / 3 * (one + video.SIDE_BYTES + charts) + styles_and_tables < MAX_BYTES == 8_000_000
