"""Output files: never over an input, whole or not at all, through links and into devices."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpetr.errors import InputError
from hpetr.images.files import RESULT_SUFFIXES, STANDARD_OUTPUT, check_output, write_bytes, write_json


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def hard_link(path: Path, target: Path) -> Path:
    os.link(target, path)
    return path


@pytest.mark.parametrize(
    "spell",
    [
        lambda path: path,
        lambda path: path.parent / "." / ".." / path.parent.name / path.name,
        lambda path: link(path.parent / "link.json", path),
        lambda path: hard_link(path.parent / "other.json", path),
    ],
    ids=["itself", "another spelling", "symbolic link", "hard link"],
)
def test_an_input_is_no_output(tmp_path: Path, spell) -> None:
    source = tmp_path / "data.json"
    source.write_text("{}")
    inputs = ["h-petr-nano", str(tmp_path / "missing.jpg"), tmp_path, str(source)]
    with pytest.raises(InputError, match="is one of the inputs, expected another file"):
        check_output(spell(source), inputs)
    assert check_output(tmp_path / "new.json", inputs) == tmp_path / "new.json"
    assert source.read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo.jpg", "expected a file to write that ends in .json or .jsonl"),
        ("folder", "is a folder"),
        ("file.json/x.json", "cannot be used as output folder"),
    ],
)
def test_what_no_results_file_can_be(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        check_output(tmp_path / name, suffixes=RESULT_SUFFIXES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder"]


def test_links_are_followed(tmp_path: Path) -> None:
    target = tmp_path / "target" / "a.json"
    path = link(tmp_path / "link.json", target)
    for text in (b"1", b"2"):  # first the target is not there
        write_bytes(check_output(path, suffixes=RESULT_SUFFIXES), text)
        assert path.is_symlink()
        assert target.read_bytes() == text
    assert [file.name for file in target.parent.iterdir()] == ["a.json"]


def test_pipes_and_devices_are_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_bytes(check_output(pipe, suffixes=RESULT_SUFFIXES), b"x" * 200_000)
    reader.join()
    assert received == [b"x" * 200_000]
    assert pipe.is_fifo()
    write_json(check_output("/dev/null", suffixes=RESULT_SUFFIXES), [1])
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match="/dev/full: cannot be written .No space left on device"):
        write_bytes(Path("/dev/full"), b"1")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_keeps_its_other_lines(tmp_path: Path, name: str) -> None:
    code = (
        "import sys; from hpetr.images.files import *; print('before');"
        "write_json(check_output(sys.argv[1], suffixes=RESULT_SUFFIXES), {'a': 1}); print('after')"
    )
    run = [sys.executable, "-c", code, name]
    assert subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout == b'before\n{"a": 1}\nafter\n'
    with (tmp_path / "out.txt").open("wb") as file:
        subprocess.run(run, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_bytes() == b'before\n{"a": 1}\nafter\n'
    assert Path(name).name != "stdout" or Path(name).is_symlink()


def test_standard_output_in_this_process(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_bytes(STANDARD_OUTPUT, b"\xff")
    assert capfdbinary.readouterr().out == b"\xff"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".json")  # 245 bytes: no room for more
    write_json(path, [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [float("nan")])
    assert json.loads(path.read_text()) == [1]
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="folder.json: cannot be written"):
        write_bytes(tmp_path / "folder.json", b"1")
    assert len(list(tmp_path.iterdir())) == 2
