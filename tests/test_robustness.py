"""Every reader against arbitrary and damaged files, in short; scripts/robustness.py does it at length."""

from pathlib import Path

import pytest
from fuzzing import READERS, fuzz


@pytest.mark.parametrize("reader", READERS)
def test_reader_refuses_in_words(reader: str, tmp_path: Path) -> None:
    """An exception that is not ours, from a file that somebody edited, cut off or made up."""
    found = fuzz(reader, tmp_path, 25)
    assert sum(found.values()) >= 25
