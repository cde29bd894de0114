"""A to-do list on the command line, kept in a JSON file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path


def load(path: Path) -> list[str]:
    if not path.exists():
        return []
    return list(json.loads(path.read_text(encoding="utf-8")))


def save(path: Path, entries: list[str]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def add_entry(path: Path, text: str) -> int:
    save(path, [*load(path), text])
    return 0


def list_entries(path: Path) -> int:
    for number, text in enumerate(load(path), start=1):
        print(f"{number}. {text}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    default = Path(os.environ.get("TODO_FILE", "todo.json"))
    parser = argparse.ArgumentParser(prog="todo.py", description=__doc__)
    parser.add_argument("--file", type=Path, default=default, help="the JSON file")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add", help="add an entry").add_argument("text")
    commands.add_parser("list", help="show all entries, numbered from 1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "add":
        return add_entry(args.file, args.text)
    return list_entries(args.file)


if __name__ == "__main__":
    raise SystemExit(main())
