"""Prompt files in LongLive's two formats, and every way to get them wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longlive_opt.errors import UserError
from longlive_opt.prompts import PromptSchedule, parse_switch_frames, read_schedules


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def refusal(path: Path, switches: object = None) -> str:
    with pytest.raises(UserError) as error:
        read_schedules(path, switches)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


def line(*prompts: str, **more: object) -> str:
    return json.dumps({"prompts": list(prompts), **more}) + "\n"


def test_text_file_is_one_prompt_a_line(tmp_path):
    """Right-stripped only, and an empty line at the end is no prompt."""
    path = write(tmp_path / "p.txt", " a fox \r\n\n\ta whale, \u00e9\u4e2d\n\n")
    assert read_schedules(path) == [PromptSchedule((" a fox",)), PromptSchedule(("\ta whale, \u00e9\u4e2d",))]
    assert read_schedules(str(path)) == read_schedules(path)


@pytest.mark.parametrize("switches", ["40,80,120,160,200", [40, 80, 120, 160, 200], (40, 80, 120, 160, 200),
                                      " 40, 80,120 ,160,200 "])
def test_jsonl_with_shared_switches(tmp_path, switches):
    """LongLive's own example: six prompts, switches from the config as text or list."""
    path = write(tmp_path / "p.jsonl", line(*"abcdef") + "\n" + line(*"ghijkl"))
    assert read_schedules(path, switches) == [PromptSchedule(tuple("abcdef"), (40, 80, 120, 160, 200)),
                                            PromptSchedule(tuple("ghijkl"), (40, 80, 120, 160, 200))]


def test_switches_as_one_number_or_on_the_line(tmp_path):
    """Two prompts need one number; what stands on the line goes before the shared list."""
    path = write(tmp_path / "p.jsonl", line("a", "b") + line("c", "d", switch_frame_indices="7"))
    assert [schedule.switch_frames for schedule in read_schedules(path, 40)] == [(40,), (7,)]
    path = write(tmp_path / "q.jsonl", line("a", "b", switch_frame_indices=[0]))
    assert read_schedules(path) == [PromptSchedule(("a", "b"), (0,))]


def test_single_prompt_needs_no_switches(tmp_path):
    """A JSONL of plain videos."""
    path = write(tmp_path / "p.jsonl", line("a") + line("b"))
    assert read_schedules(path) == [PromptSchedule(("a",)), PromptSchedule(("b",))]


@pytest.mark.parametrize("content, says", [
    ("not json\n", "line 1: is not JSON"), ('{"prompts": ["a"]\n', "line 1: is not JSON"),
    ("[]\n", "no list 'prompts'"),
    ('"a"\n', "no list 'prompts'"), ("3\n", "no list 'prompts'"), ("null\n", "no list 'prompts'"),
    ('{"prompt": ["a"]}\n', "no list 'prompts'"), ('{"prompts": "a"}\n', "no list 'prompts'"),
    ('{"prompts": []}\n', "no list 'prompts'"), ('{"prompts": ["a", ""]}\n', "no list 'prompts'"),
    ('{"prompts": ["a", 3]}\n', "no list 'prompts'"), ('{"prompts": [["a"]]}\n', "no list 'prompts'"),
    ('\n{"prompts": ["a"]}\n{"prompts": [" "]}\n', "line 3 has no list"),
    ('{"prompts": ["a", "b"]}\n', "has 2 prompts and no switch_frame_indices; add 1"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [1, 2]}\n', "2 switch frames for 2 prompts"),
    ('{"prompts": ["a"], "switch_frame_indices": [1]}\n', "1 switch frames for 1 prompts"),
    ('{"prompts": ["a", "b", "c"], "switch_frame_indices": [5, 5]}\n', "must be strictly increasing"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [-1]}\n', "not negative"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [1.5]}\n', "line 1, switch_frame_indices: [1.5]"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": true}\n', "line 1, switch_frame_indices: True"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": "x"}\n', "line 1, switch_frame_indices: 'x'"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": {"3": 1}}\n', "is not a list of latent frames"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": "1_2"}\n', "is not a list of latent frames"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": "\u0663"}\n', "is not a list of latent frames"),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [' + "9" * 5000 + "]}\n", "too long"),
    ('{"promts": ["a"], "prompts": ["b"]}\n', "unknown key 'promts'"),
    ('{"prompts": ["a"], "prompts": ["b"]}\n', "'prompts' occurs twice"),
    ('{"prompts": ["a \\u001b[31m"]}\n', "a control character"),
    ("", "contains no prompt"), (" \n\t\n", "contains no prompt"), (b"\xff\xfe\x00", "not UTF-8"),
])
def test_bad_jsonl_is_refused_in_one_line(tmp_path, content, says):
    """A KeyError or a half-read file: the message names file, line and remedy."""
    message = refusal(write(tmp_path / "p.jsonl", content))
    assert says in message and "p.jsonl" in message


def test_half_a_character_is_refused_and_a_pair_is_joined(tmp_path):
    """Text that no file can hold, found when result.json is written after the measurement."""
    path = write(tmp_path / "p.jsonl", line("a") + '{"prompts": ["a fox \\ud83e"]}\n')
    message = refusal(path)
    assert "p.jsonl line 2, prompts[0]: 'a fox \\ud83e' holds '\\ud83e'" in message
    message.encode()
    path = write(tmp_path / "p.jsonl", '{"prompts": ["a \\ud83e\\udd8a"]}\n')
    assert read_schedules(path) == [PromptSchedule(("a \U0001f98a",))]


def test_lines_need_the_same_number_of_prompts(tmp_path):
    """LongLive's rule for one shared list of switches."""
    path = write(tmp_path / "p.jsonl", line("a", "b", switch_frame_indices=1) + line("c"))
    assert "[1, 2] prompts" in refusal(path)


def test_shared_switches_that_do_not_fit_name_the_line(tmp_path):
    """An index error later, or switches that never happen."""
    path = write(tmp_path / "p.jsonl", line("a", "b"))
    assert "line 1, switch_frame_indices: 2 switch frames" in refusal(path, "3,6")


@pytest.mark.parametrize("value", ["", "a", "1,", "1.5", "1;2", True, [True], [1.0], [None], [[1]], 2.5])
def test_switch_frames_that_are_no_list_of_frames(value):
    """A comma at the end, a fraction, a boolean that counts as 1."""
    with pytest.raises(UserError, match="setting: .* is not a list of latent frames; write"):
        parse_switch_frames(value, "setting")


def test_a_late_switch_names_its_file_and_line(tmp_path):
    """A frame number, and a search through a hundred lines for it."""
    path = write(tmp_path / "p.jsonl", line("a", "b", switch_frame_indices=3) * 2 +
                 line("a", "b", switch_frame_indices=90))
    for schedule in read_schedules(path)[:2]:
        schedule.check_fits(6, 3)
    with pytest.raises(UserError, match=r"p.jsonl line 3, switch_frame_indices: 90 .*\(video_latent"):
        read_schedules(path)[2].check_fits(6, 3)
    even, = read_schedules(write(tmp_path / "q.jsonl", line("a", "b")), None, (6, 3))
    assert even == PromptSchedule(("a", "b"), (9,)) and even.source.endswith("q.jsonl line 1")


def test_files_that_cannot_be_read(tmp_path):
    """A path typed wrong, a folder, a format that is not ours."""
    assert "cannot read" in refusal(tmp_path / "absent.txt")
    assert "cannot read" in refusal(tmp_path)
    assert "'.csv'" in refusal(write(tmp_path / "p.csv", "a\n"))
    assert "'nothing'" in refusal(write(tmp_path / "prompts", "a\n"))
    assert "contains no prompt" in refusal(write(tmp_path / "p.txt", "\n \n"))
    assert "not UTF-8" in refusal(write(tmp_path / "q.txt", b"caf\xe9\n"))


def test_line_separators_inside_json_texts_do_not_cut_the_line(tmp_path):
    """JSON allows a bare U+2028 or U+0085 in a text; only a line feed ends a line of JSONL."""
    path = write(tmp_path / "p.jsonl", '{"prompts": ["a\u2028b\u0085c"]}\n')
    assert read_schedules(path) == [PromptSchedule(("a\u2028b\u0085c",))]


def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    """Editors on Windows put one at the start of a UTF-8 file."""
    assert read_schedules(write(tmp_path / "p.txt", "\ufeffa fox\n")) == [PromptSchedule(("a fox",))]
    assert read_schedules(write(tmp_path / "p.jsonl",
                                "\ufeff" + line("a fox"))) == [PromptSchedule(("a fox",))]


def test_switches_for_a_text_file_are_refused(tmp_path):
    """Each line is a video of its own: switches that never happen must not pass silently."""
    assert "switch_frame_indices" in refusal(write(tmp_path / "p.txt", "a\nb\n"), [3])


def test_deeply_nested_json_is_refused(tmp_path):
    """A file of brackets exhausts the JSON parser's stack."""
    for text in ("[" * 100_000, "[" * 60 + "]" * 60):
        assert "levels of lists" in refusal(write(tmp_path / "p.jsonl", text + "\n"))
