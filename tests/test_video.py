"""Claims about mp4, contact sheets and inline HTML."""

import base64
import builtins
import errno
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longlive_opt.errors import UserError
from longlive_opt.report import video


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
    data = text.split("base64,")[1].split('"')[0]
    assert base64.b64decode(data) == (tmp_path / "video.mp4").read_bytes()
    with pytest.raises(UserError, match="cannot read"):
        video.video_html(tmp_path / "missing.mp4")
