import hashlib
import socket

import pytest

from baton.data.download import fetch, verify


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_files_appear_only_when_everything_is_complete(tmp_path):
    def build(folder):
        assert folder.parent == tmp_path
        write(folder, "set/a", b"1")
        assert not (tmp_path / "set").exists()
        write(folder, "set/b", b"2")

    fetch("Toy", tmp_path, build, {"set/a": None, "set/b": None}, {})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["set", "set/a", "set/b"]


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), RuntimeError("File not found or corrupted."), EOFError(), TimeoutError()]
)
def test_a_broken_download_leaves_nothing_and_names_folder_and_files(tmp_path, error):
    def build(folder):
        write(folder, "set/a", b"half")
        raise error

    with pytest.raises(FileNotFoundError) as caught:
        fetch("Toy", tmp_path, build, {"set/a": None, "set/b": None}, {"toy.tar.gz": "0"})
    sentence = str(caught.value)
    reason = str(error) or type(error).__name__
    assert f"Toy needs set/a, set/b in {tmp_path}, and downloading failed ({reason})" in sentence
    assert f"put toy.tar.gz into {tmp_path}" in sentence
    assert "\n" not in sentence
    assert caught.value.__cause__ is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_built_when_the_files_are_there(tmp_path):
    write(tmp_path, "a", b"1")
    fetch("Toy", tmp_path, lambda folder: pytest.fail("downloaded again"), {"a": None}, {})


def test_an_archive_put_there_by_hand_is_used_and_kept_and_a_damaged_one_is_mentioned(tmp_path):
    write(tmp_path, "toy.gz", b"archive")
    good = {"toy.gz": hashlib.md5(b"archive").hexdigest()}
    fetch("Toy", tmp_path, lambda folder: write(folder, "a", (folder / "toy.gz").read_bytes()), {"a": None}, good)
    assert (tmp_path / "a").read_bytes() == b"archive"
    assert (tmp_path / "toy.gz").read_bytes() == b"archive"
    assert not (tmp_path / "toy.gz").is_symlink()

    def build(folder):
        assert not (folder / "toy.gz").exists()
        raise OSError("offline")

    with pytest.raises(FileNotFoundError, match=r"\(toy.gz there is damaged\)"):
        fetch("Toy", tmp_path, build, {"b": None}, {"toy.gz": "0" * 32})


def test_a_server_that_does_not_answer_is_given_up_and_the_timeout_is_restored(tmp_path):
    def build(folder):
        assert 0 < socket.getdefaulttimeout() <= 30
        raise TimeoutError("timed out")

    with pytest.raises(FileNotFoundError, match="timed out"):
        fetch("Toy", tmp_path, build, {"a": None}, {})
    assert socket.getdefaulttimeout() is None


def test_verify_tells_missing_from_damaged(tmp_path):
    write(tmp_path, "a", b"1")
    verify("Toy", tmp_path, {"a": hashlib.md5(b"1").hexdigest()})
    with pytest.raises(FileNotFoundError, match=f"Toy needs {tmp_path}/b, which is missing"):
        verify("Toy", tmp_path, {"b": None})
    with pytest.raises(ValueError, match=f"cannot use {tmp_path}/a: the file is damaged"):
        verify("Toy", tmp_path, {"a": "0" * 32})
