from __future__ import annotations

from pathlib import Path

import pytest

from todo import main


@pytest.fixture(autouse=True)
def todo_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "todo.json"
    monkeypatch.setenv("TODO_FILE", str(path))
    return path


def test_list_shows_nothing_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == ""


def test_list_numbers_the_entries_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add", "buy milk"]) == 0
    assert main(["add", "call home"]) == 0
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "1. buy milk\n2. call home\n"


def test_file_option_wins_over_the_environment(todo_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert main(["--file", str(other), "add", "water the plants"]) == 0
    assert other.exists()
    assert not todo_file.exists()


def test_unknown_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
