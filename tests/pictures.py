"""The README's session and pictures, made from real runs: `python tests/pictures.py` writes them anew."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import PROGRAM, ROOT, Repository, isolate

README = ROOT / "README.md"
PICTURES = {
    ".github/proposed.svg": "issue-to-pr issues/issue-discount.md --simulate good",
    ".github/rejected.svg": "issue-to-pr issues/issue-discount.md --simulate bad",
}
SESSION = re.compile(r"(?<=<!-- session: )(?P<words>.*?) -->\n```text\n(?P<text>.*?)(?=```)", re.DOTALL)
COLUMNS, CELL, LINE = 100, 7.8, 18
STYLES = (
    (r"\$ ", "font-weight:bold;fill:#79c0ff"),
    (r"▸ |agent_runner \d", "font-weight:bold"),
    (r"PROPOSED", "font-weight:bold;fill:#56d364"),
    (r"[A-Z-]+ \(exit", "font-weight:bold;fill:#ff7b72"),
    (r"  ✓", "fill:#56d364"),
    (r"  ✗|  │ E", "fill:#ff7b72"),
    (r"  !", "fill:#e3b341"),
    (r"  (agent )?│", "fill:#9da7b1"),
)


def fresh_clone(folder: Path) -> Repository:
    """The demo as a newcomer has it: a clone, whose remote is no forge."""
    made = Repository(folder / "agent_runner")
    for name in ("agent_demo.py", "test_agent_demo.py", "pyproject.toml", "AGENTS.md", "agent_runner.py", "issues"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        made.path.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, made.path / name)
    made.git("init", "-q", "-b", "main")
    made.git("config", "user.name", "You")
    made.git("config", "user.email", "you@example.invalid")
    made.git("remote", "add", "origin", str(folder / "origin.git"))
    made.commit("start")
    return made


def run_sessions() -> dict[str, str]:
    """What each run prints, by its command line; each in a fresh clone of its own."""

    def run(words: str) -> str:
        made = fresh_clone(Path(folder) / words.split()[-1])
        argv = [sys.executable, str(made.path / PROGRAM.name), *shlex.split(words)]
        return subprocess.run(argv, cwd=made.path, capture_output=True, check=False).stdout.decode()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        isolate(patch, Path(folder) / "home")
        return dict(zip(PICTURES.values(), pool.map(run, PICTURES.values()), strict=True))


def settled(text: str) -> list[str]:
    """The words of a session without what differs from run to run and from machine to machine."""
    text = re.sub(r"\n  guard: .*(\n  note: without the kernel.*)?", "\n  guard: LEVELS", text)
    text = re.sub(r"\b[0-9a-f]{12}\b|\d+\.\d s|\d{8}-\d{6}", "…", text)
    return text.split()


def draw(words: str, text: str) -> str:
    """A picture of a terminal that shows the command and what it printed."""
    spans: list[str] = []
    for line in f"$ python3 agent_runner.py {words}\n{text}".rstrip().split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        wrap = textwrap.TextWrapper(COLUMNS, subsequent_indent=indent, drop_whitespace=False, break_on_hyphens=False)
        style = next((f' style="{style}"' for pattern, style in STYLES if re.match(pattern, line)), "")
        for piece in wrap.wrap(line) or [""]:
            place = f'x="16" y="{28 + len(spans) * LINE}"'
            spans.append(f"<tspan {place}{style}>{html.escape(piece, quote=False)}</tspan>")
    width, height = round(COLUMNS * CELL) + 32, len(spans) * LINE + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' role="img" font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"'
        f' font-size="13">\n<title>{html.escape(words)}</title>\n'
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
        '<text xml:space="preserve" fill="#e6edf3">\n' + "\n".join(spans) + "\n</text>\n</svg>\n"
    )


def shown_in(svg: str) -> str:
    """The text of a picture, after its command."""
    lines = re.findall(r"<tspan[^>]*>(.*?)</tspan>", svg)
    return "\n".join(html.unescape(line) for line in lines[1:])


def main() -> int:
    texts = run_sessions()
    for name, words in PICTURES.items():
        (ROOT / name).write_text(draw(words, texts[words]), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    readme = SESSION.sub(lambda found: f"{found['words']} -->\n```text\n{texts[found['words']]}", readme)
    README.write_text(readme, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
