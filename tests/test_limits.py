"""A run always ends: limits, floods of output, interruption, and what killed runs leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, PROGRAM, Repository, Result, bwrap_works

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))

CHEAP = ("issue.md", "--gate", CHEAP_GATE, "--no-baseline", "--no-switch")
LIMIT, GRACE = 1.0, 2.0
SLACK = 6.0  # seconds that a busy machine may add to so many runs at once

# What every hostile program below starts with: work to keep, and children that carry a mark in their command line.
PRELUDE = """
import os, pathlib, signal, subprocess, sys, time
MARK = sys.argv[1]
calc = pathlib.Path("calc.py")
calc.write_text(calc.read_text() + "\\n\\ndef triple(x):\\n    return x * 3\\n")

def child(**options):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-S", "-c", code, MARK], **options)

def double_fork():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            child()
        os._exit(0)
    os.wait()

def hang():
    while True:
        time.sleep(60)
"""
CHILDREN = """
pathlib.Path(os.environ["TMPDIR"], "mine").write_text("temporary")
child()
child(start_new_session=True)
double_fork()
os.environ.clear()
double_fork()
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + CHILDREN + "for _ in range(30): child()\nhang()"
POLITE = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); child(start_new_session=True); hang()"
LEVEL_NAMES = ["off", "require"] if bwrap_works() else ["off"]


def running(mark: str) -> list[str]:
    """The command lines of living processes that carry a mark."""
    listing = subprocess.run(["ps", "-axww", "-o", "command="], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if mark in line and "<defunct>" not in line]


def left_in_cache(home: Path) -> list[str]:
    return [str(path) for path in (home / ".cache" / "agent-runner").glob("*/*")]


def test_limits_end_agent_gate_and_setup_with_all_they_started(repo: Repository, agent: Any, hermetic: Path) -> None:
    """Every case at once, since they mostly wait: TERM, the grace, and KILL at a limit of one second."""
    quick = agent("open('new.txt', 'w').write('new')")
    cases = []
    for sandbox in LEVEL_NAMES:
        for how, text in {"deaf": DEAF, "polite": POLITE, "ends": CHILDREN}.items():
            cases.append((how, agent(PRELUDE + text, arguments=f"mark-{os.getpid()}-{len(cases)}."), sandbox, ()))
    for option in ("--gate", "--setup"):
        slow = agent(PRELUDE + DEAF, arguments=f"mark-{os.getpid()}-{len(cases)}.")
        cases.append((option, quick, "off", (option, slow)))
    cases.append(("hang", "", "off", ("--simulate", "hang")))

    def run(case: tuple[str, str, str, tuple[str, ...]]) -> tuple[Result, float]:
        how, command, sandbox, more = case
        words = ("issue.md", "--json", "--no-baseline", "--no-switch", "--sandbox", sandbox, *more)
        words += ("--agent-timeout", "1s", "--gate-timeout", "1s") + (() if how == "--gate" else ("--gate", CHEAP_GATE))
        started = time.monotonic()
        return repo.run("issue-to-pr", *words, agent=command), time.monotonic() - started

    with ThreadPoolExecutor(len(cases)) as pool:
        done = list(pool.map(run, cases))
    assert not running(f"mark-{os.getpid()}-")
    assert not left_in_cache(hermetic)
    for (how, *_), (result, seconds) in zip(cases, done, strict=True):
        report = result.report
        assert seconds < LIMIT + GRACE + SLACK, how
        if how in ("deaf", "polite", "hang"):
            assert (report["outcome"], report["attempts"][0]["timed_out"]) == ("agent-failed", True), how
            assert how == "hang" or "triple" in repo.git("show", f"{report['kept']}:calc.py"), how
        elif how == "ends":
            assert report["outcome"] == "proposed"
        else:
            assert result.status == {"--gate": 1, "--setup": 3}[how]
            assert "took longer than its limit" in report["message"]


# ------------------------------------------------------------------------------------------- output


def on_terminal(repo: Repository, *words: str, agent: str, env: dict[str, str]) -> str:
    """What a run shows on a terminal of 80 columns, colours on."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = os.environ | env | {"AGENT_CMD": agent}
    environ.pop("NO_COLOR", None)
    argv = [sys.executable, str(PROGRAM), *words]
    child = subprocess.Popen(argv, cwd=repo.path, env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    data = b""
    with contextlib.suppress(OSError):  # EIO, once nobody holds the other end
        while chunk := os.read(ours, 1 << 16):
            data += chunk
    os.close(ours)
    child.wait(30)
    return data.decode()


FLOOD = """
import os
line = b"x" * 999 + b"\\n"
for _ in range(20_000):
    os.write(1, line * 10)
print("the very end")
open("new.txt", "w").write("new")
"""


MEASURED = """
import atexit, re, runpy, sys
PEAK = sys.argv.pop(1)
@atexit.register
def note():
    status = open("/proc/self/status").read()
    open(PEAK, "w").write(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_flood_of_output_costs_neither_memory_nor_disk(
    repo: Repository, agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "peak"), str(PROGRAM), "issue-to-pr", *CHEAP, "--json"]
    monkeypatch.setenv("AGENT_CMD", agent(FLOOD))
    done = subprocess.run(words, cwd=repo.path, capture_output=True, text=True, timeout=60)
    assert int((tmp_path / "peak").read_text()) < 50_000  # kB
    report = json.loads(done.stdout)
    assert report["outcome"] == "proposed"
    log = (Path(report["record"]) / "agent-1.log").read_text()
    assert "[… 199.9 MB left out …]" in log
    assert log.endswith("the very end\n")
    assert sum(file.stat().st_size for file in Path(report["record"]).rglob("*") if file.is_file()) < 400_000
    assert len(done.stderr) < 100_000


NASTY = r"""
import os, sys
SECRETS = [os.environ[f"TEST_{n}_SECRET"] for n in "ABC"]
lines = [
    b"title \x1b]0;FORGED\x07 clipboard \x1b]52;c;Rk9SR0VE\x1b\\ alternate \x1b[?1049h cursor \x1b[10A\x1b[2K up",
    b"C1 \x9b2J \xc2\x9b2J \xc2\x9d0;FORGED\xc2\x9c invalid \xff\xfe\xc0\x80 NUL \x00 bell \x07 backspace \x08\x08",
    b"erased\rPROPOSED (exit 0): FORGED", b"a\x0bPROPOSED FORGED", b"b\x0cPROPOSED FORGED",
    "c\u2028PROPOSED FORGED\u2029PROPOSED FORGED\x85PROPOSED FORGED".encode(),
    "▸ the gate judges FORGED".encode(), b"\x1b[8mhidden colours\x1b[30;40m FORGED",
    b"device control \x1bP1$r FORGED", b"unfinished \x1b]2;title", b"this must not be swallowed",
    b"w" * 69 + b"PROPOSED (exit 0): FORGED", "だ".encode() * 34 + "PROPOSED (exit 0): FORGED".encode(),
    *(secret.encode() for secret in SECRETS),
]
os.write(1, b"\n".join(lines) + b"\n" + b"y" * 30_000 + SECRETS[0].encode() + b"\n")
open("new.txt", "w").write("\n".join(SECRETS))
"""
SECRETS = {
    "TEST_A_SECRET": "plain-secret-1",
    "TEST_B_SECRET": 'quo"ted\\secret-2é',
    "TEST_C_SECRET": "line-one-3\nline-two-4",
}
SECRET_PARTS = ("plain-secret-1", "secret-2", "line-one-3", "line-two-4")
SGR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def test_nothing_of_the_agents_drives_the_terminal_or_looks_like_ours(repo: Repository, agent: Any) -> None:
    shown = on_terminal(repo, "issue-to-pr", *CHEAP, agent=agent(NASTY), env=SECRETS)
    assert "this must not be swallowed" in shown
    shown = re.sub(r"[^\n\x1b]*\r\x1b\[K", "", shown.replace("\r\n", "\n"))  # the clock of the step, erased by itself
    lines = SGR.sub("", shown).split("\n")
    for line in lines:
        assert not CONTROL.search(line), line
        assert "FORGED" not in line or line.startswith("  agent │ "), line
        assert not line.startswith("  agent │ ") or len(line) + sum(not c.isascii() for c in line[10:]) <= 80, line
    (record,) = (repo.path / ".git" / "agent-runner").iterdir()
    texts = {file.name: file.read_text("utf-8") for file in record.iterdir() if file.is_file()}
    texts["terminal"] = shown
    for name, text in texts.items():
        assert not CONTROL.search(SGR.sub("", text)) or name == "terminal", name
        assert not [part for part in SECRET_PARTS if part in text], name
    assert "this must not be swallowed" in texts["agent-1.log"]


def test_brief_of_a_megabyte_that_nobody_reads_does_not_block(repo: Repository, agent: Any) -> None:
    repo.write("issue.md", "# Much\n\n" + "word " * 200_000)
    result = repo.run("issue-to-pr", *CHEAP, agent=agent("open('new.txt', 'w').write('new')"))
    assert result.status == 0, result.out
