"""Files that are written whole or not at all."""

import pytest

from sephjax import atomic
from sephjax.errors import RunError, UserError


def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "new" / "below" / "a.json"
    for text in ("first", "second"):
        atomic.write_text(file, text, "choose another")
        assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def half(file, then):
    with atomic.draft(file, "make room") as path:
        path.write_text("hal")
        assert file.read_text() == "before"
        then()


def stop():
    raise KeyboardInterrupt


def fill_the_disk():
    with open("/dev/full", "w") as full:
        full.write("f")


@pytest.mark.parametrize(("then", "error"), [(stop, KeyboardInterrupt), (fill_the_disk, RunError)])
def test_a_write_that_stops_half_way_leaves_the_file_as_it_was(tmp_path, then, error):
    file = tmp_path / "a.json"
    file.write_text("before")
    with pytest.raises(error) as caught:
        half(file, then)
    if error is RunError:
        told = f"{file} cannot be written (No space left on device); make room."
        assert str(caught.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "before"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    below = tmp_path / "file" / "a.json"
    with pytest.raises(UserError) as error:
        atomic.write_text(below, "text", "choose another")
    assert str(error.value) == f"{below} cannot be written (File exists); choose another."
