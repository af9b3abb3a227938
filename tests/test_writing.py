"""Files are complete or absent."""

import errno
import os

import pytest

from spade_fast import writing
from spade_fast.writing import remove_unfinished, written


def write(path, text):
    with written(path) as unfinished:
        unfinished.write_text(text)


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "first")
    with pytest.raises(KeyError), written(path) as unfinished:
        unfinished.write_text("sec")
        raise KeyError
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_kept_and_new_files_have_the_usual_ones(tmp_path):
    usual, path = tmp_path / "usual", tmp_path / "a.txt"
    usual.touch()
    write(path, "first")
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    write(path, "second")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_is_kept_and_its_name_determines_the_format(tmp_path):
    """A cache has links with suffixes to files without."""
    (tmp_path / "blob").write_text("first")
    (tmp_path / "a.txt").symlink_to("blob")
    with written(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("second")
    assert unfinished.suffix == ".txt" and (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "blob").read_text() == "second"


def test_devices_folders_and_files_in_no_folder_are_refused(tmp_path):
    for path, error in (
        ("/dev/null", "/dev/null is a device"),
        (tmp_path, "is a directory; it should be a file"),
        (tmp_path / "none" / "a.txt", "should be a folder to write a.txt into"),
    ):
        with pytest.raises(OSError, match=error), written(path):
            raise AssertionError("nothing should be written")


def test_several_writers_of_one_file(tmp_path):
    path = tmp_path / "a.txt"
    with written(path) as first, written(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_the_longest_possible_file_name(tmp_path):
    name = "a" * 251 + ".txt"
    write(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(writing.fcntl is None, reason="Windows has no such locks")
def test_only_abandoned_files_are_removed(tmp_path):
    """As when two processes fill one folder."""
    dead = tmp_path / f".0123{writing.UNFINISHED}.txt"
    dead.write_text("half")
    with written(tmp_path / "a.txt") as unfinished:
        remove_unfinished(tmp_path)
        assert os.listdir(tmp_path) == [unfinished.name]
        unfinished.write_text("text")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(writing.fcntl is None, reason="Windows has no such locks")
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    with written(tmp_path / "a.txt") as unfinished:
        remove_unfinished(tmp_path)
        unfinished.write_text("text")
    assert os.listdir(tmp_path) == ["a.txt"]
