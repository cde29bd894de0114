"""A run always ends: limits, floods of output, interruption, and what killed runs leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import agent_runner
from conftest import CHEAP_GATE, PROGRAM, Repository, Result, bwrap_works, small_app

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))

CHEAP = ("issue.md", "--gate", CHEAP_GATE, "--no-baseline", "--no-switch")
LIMIT, GRACE = 1.0, 2.0
SLACK = 20.0  # seconds that a busy machine may add to so many runs at once; the hostile programs wait for minutes

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
    return [path.name for path in (home / ".cache" / "agent-runner").iterdir() if path.is_dir()]


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
            assert report["outcome"] == "proposed", report["message"]
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


# ------------------------------------------------------------------------------------- interruption

# A `git` that sends a signal to whoever started it, at the first command that contains $AT.
SIGNALLING_GIT = """\
#!/bin/sh
case "$*" in *"$AT"*) mkdir "$ONCE" 2>/dev/null && kill -s "$SIGNAL" "$PPID";; esac
exec "{git}" "$@"
"""
WORKS_ON = PRELUDE + "child(start_new_session=True)\nprint('ready', flush=True)\nhang()"
READY = "agent │ ready"


class Moment(NamedTuple):
    """When a signal comes: at a line of the run's output, or at one of its Git commands."""

    signal: str
    at_line: str = ""
    at_git: str = ""
    sandbox: str = "off"
    times: int = 1
    kept: bool = True  # had the agent done something by then?


MOMENTS = {
    "preflight": Moment("TERM", at_git="rev-parse", kept=False),
    "clone": Moment("INT", at_git="read-tree", kept=False),
    "agent": Moment("HUP", READY),
    "agent-in-namespace": Moment("TERM", READY, sandbox=LEVEL_NAMES[-1]),
    "agent-twice": Moment("INT", READY, times=2),
    "gate": Moment("INT", "the gate judges the change"),
    "baseline": Moment("TERM", "waiting for the verdict on the base"),
    "baseline-in-namespace": Moment("INT", "waiting for the verdict on the base", sandbox=LEVEL_NAMES[-1]),
    "proposal": Moment("TERM", at_git="update-ref -m agent_runner"),
}


@pytest.fixture
def signalling_git(tmp_path: Path) -> str:
    """A PATH on which `git` is the one above."""
    folder = tmp_path / "signalling"
    folder.mkdir()
    (folder / "git").write_text(SIGNALLING_GIT.format(git=shutil.which("git")))
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def interrupt(repo: Repository, moment: Moment, command: str, env: dict[str, str]) -> tuple[int, str]:
    """Run to a moment, send the signal, and wait for the end: exit status and output."""
    waits = "gate" in moment.at_line or "verdict" in moment.at_line
    mark = command.rpartition(" ")[2]  # by which what is left of the gate would be found
    gate = shlex.join([sys.executable, "-S", "-c", "import time; time.sleep(60)", mark]) if waits else CHEAP_GATE
    words = ["issue.md", "--gate", gate, "--sandbox", moment.sandbox]
    words += [] if "verdict" in moment.at_line else ["--no-baseline"]
    child = subprocess.Popen(
        [sys.executable, str(PROGRAM), "issue-to-pr", *words],
        cwd=repo.path,
        env=os.environ
        | env
        | {"AGENT_CMD": command, "AT": moment.at_git or "never", "SIGNAL": moment.signal, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert child.stdout is not None
    shown = ""
    while moment.at_line and moment.at_line not in shown:
        shown += child.stdout.readline()
    for _ in range(moment.times if moment.at_line else 0):
        child.send_signal(signal.Signals[f"SIG{moment.signal}"])
        time.sleep(0.3)
    try:
        return child.wait(30), shown + child.stdout.read()
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)  # it tells where each of its threads stands
        raise AssertionError(f"{moment} does not end:\n{shown}{child.communicate()[0]}") from None


def test_interruption_at_any_moment_ends_all_and_keeps_the_work(
    tmp_path: Path, agent: Any, hermetic: Path, signalling_git: str
) -> None:
    """Every moment at once, each in a repository of its own."""
    cases = []
    for name, moment in MOMENTS.items():
        repo = small_app(tmp_path / name)
        repo.write("calc.py", "def double(x):\n    return x + x\n")  # an edit that is not committed
        repo.write("notes.txt", "untracked")
        text = WORKS_ON if moment.at_line == READY else PRELUDE
        command = agent(text, arguments=f"mark-{os.getpid()}-{name}.")
        cases.append((name, moment, repo, command, repo.state()))

    def run(case: tuple[str, Moment, Repository, str, Any]) -> tuple[int, str]:
        name, moment, repo, command, _ = case
        return interrupt(repo, moment, command, {"PATH": signalling_git, "ONCE": str(tmp_path / f"once-{name}")})

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(run, cases))
    assert not running(f"mark-{os.getpid()}-")
    assert not left_in_cache(hermetic)
    for (name, moment, repo, _, before), (status, shown) in zip(cases, done, strict=True):
        assert "Traceback" not in shown, name
        if name == "proposal":  # made whole: what is said is true of the repository
            assert (status, "PROPOSED" in shown) == (0, True), shown
            assert "triple" in repo.git("show", "agent/issue:calc.py")
            continue
        assert (status, "INTERRUPTED" in shown) == (128 + signal.Signals[f"SIG{moment.signal}"], True), (name, shown)
        assert repo.state() == before, name
        kept = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner")
        assert bool(kept) == moment.kept, name
        assert not kept or "triple" in repo.git("show", f"{kept}:calc.py"), name


def test_signal_that_was_ignored_at_the_start_stays_ignored(repo: Repository, agent: Any) -> None:
    """As under nohup: the terminal may close."""
    text = "import os, signal\nopen('new.txt', 'w').write('new')\nos.kill(os.getppid(), signal.SIGHUP)"
    command = shlex.join([sys.executable, str(PROGRAM), "issue-to-pr", *CHEAP, "--sandbox", "off"])
    env = os.environ | {"AGENT_CMD": agent(text)}
    assert subprocess.run(["sh", "-c", f"trap '' HUP; {command}"], cwd=repo.path, env=env).returncode == 0


def test_output_that_nobody_reads_does_not_stop_the_run(repo: Repository, agent: Any) -> None:
    ways = [("", "| head -1"), ("", ">&-"), ("", ">&- 2>&- <&-")]
    ways += [("", "> /dev/full"), ("--json 2> /dev/null", "> /dev/full")] if os.path.exists("/dev/full") else []
    command = shlex.join([sys.executable, str(PROGRAM), "issue-to-pr", *CHEAP])
    env = os.environ | {"AGENT_CMD": agent("print('much\\n' * 100)\nopen('new.txt', 'w').write('new')")}
    env.pop("PYTHONUNBUFFERED", None)

    def run(way: tuple[str, str]) -> str:
        script = f"{{ {command} {way[0]}; echo $? >&3; }} 3>&2 {way[1]}"
        return subprocess.run(["bash", "-c", script], cwd=repo.path, env=env, stderr=subprocess.PIPE, text=True).stderr

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, ways)) == ["0\n"] * len(ways)
    assert len(repo.git("branch", "--list", "agent/*").splitlines()) == len(ways)


def start(repo: Repository, command: str, *words: str) -> subprocess.Popen[str]:
    """A run under way: its agent says `ready`, and goes on doing what it does."""
    argv = [sys.executable, str(PROGRAM), "issue-to-pr", "issue.md", "--gate", CHEAP_GATE, "--no-baseline", *words]
    env = os.environ | {"AGENT_CMD": command}
    child = subprocess.Popen(argv, cwd=repo.path, env=env, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert child.stdout is not None
    while READY not in child.stdout.readline():
        pass
    return child


@pytest.mark.parametrize("sandbox", LEVEL_NAMES)
def test_run_beside_another_on_the_same_issue_disturbs_nothing(
    repo: Repository, agent: Any, tmp_path: Path, hermetic: Path, sandbox: str
) -> None:
    wait = f"print('ready', flush=True)\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    slow = start(repo, agent(f"import os, time\nopen('a.txt', 'w').write('a')\n{wait}"), "--sandbox", sandbox)
    words = ("issue.md", "--gate", CHEAP_GATE, "--no-baseline", "--sandbox", sandbox)
    quick = repo.run("issue-to-pr", *words, agent=agent("open('b.txt', 'w').write('b')"))
    assert quick.status == 0, quick.out
    assert repo.git("symbolic-ref", "--short", "HEAD") == "agent/issue"
    assert left_in_cache(hermetic)  # the living run's
    (tmp_path / "go").touch()
    shown, _ = slow.communicate(timeout=30)
    assert slow.returncode == 0, shown
    files = [repo.git("diff", "--name-only", "main", branch) for branch in ("agent/issue", "agent/issue-2")]
    assert files == ["b.txt", "a.txt"]
    assert repo.git("symbolic-ref", "--short", "HEAD") == "agent/issue"  # the first to come, left as it is
    assert not left_in_cache(hermetic)


def test_work_beside_is_over_when_a_signal_has_ended_the_wait_for_it() -> None:
    """Up to Python 3.12 a `join` that a signal handler's exception leaves takes its thread for ended."""
    stop, ended = threading.Event(), []

    def work() -> None:
        stop.wait(20)
        time.sleep(0.3)
        ended.append(True)

    def interrupt(number: int, frame: object) -> None:
        raise agent_runner.Interrupted(number)

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(agent_runner.Interrupted), agent_runner.beside(stop, work) as wait:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            wait()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert ended


# ---------------------------------------------------------------------------------------- leftovers


def test_folder_of_a_run_that_has_just_ended_stops_no_other(tmp_path: Path) -> None:
    """A run looks through the folders of all others while those end, and take their own away."""
    assert agent_runner.lock_folder(tmp_path / "gone") is None
    held = agent_runner.lock_folder(tmp_path)
    assert held and agent_runner.lock_folder(tmp_path) is None
    held.close()


@pytest.mark.parametrize("sandbox", LEVEL_NAMES)
def test_run_after_a_killed_one_ends_what_it_left_and_keeps_its_work(
    repo: Repository, agent: Any, hermetic: Path, sandbox: str
) -> None:
    mark = f"mark-{os.getpid()}-killed-{sandbox}."
    killed = start(repo, agent(WORKS_ON, arguments=mark), "--sandbox", sandbox)
    killed.kill()
    killed.communicate()
    before = repo.state()
    assert not repo.git("for-each-ref", "refs/agent-runner")
    result = repo.run("issue-to-pr", *CHEAP, agent=agent("print('nothing to do')"))
    assert result.status == 4
    assert not running(mark)
    assert not left_in_cache(hermetic)
    (kept,) = repo.git("for-each-ref", "--format=%(refname)", "refs/agent-runner").splitlines()
    assert f"git show {kept}" in result.out
    assert "triple" in repo.git("show", f"{kept}:calc.py")
    assert repo.state() == before


def test_records_and_kept_work_are_pruned_to_fifty(repo: Repository, agent: Any) -> None:
    records = repo.path / ".git" / "agent-runner"
    (records / "baseline").mkdir(parents=True)
    orders = ""
    for number in range(60):
        name = f"20200101-0000{number:02}-old"
        (records / "baseline" / f"{number}.json").touch()
        if number % 2:
            (records / name).mkdir()
        else:
            orders += f"create refs/agent-runner/{name} HEAD\n"
    subprocess.run(["git", "update-ref", "--stdin"], cwd=repo.path, input=orders, text=True, check=True)
    repo.git("update-ref", "refs/agent-runner/mine", "HEAD")
    assert repo.run("issue-to-pr", *CHEAP, agent=agent("open('new.txt', 'w').write('new'); exit(1)")).status == 4
    refs = repo.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/agent-runner").splitlines()
    left = {path.name for path in records.iterdir()} | set(refs)
    assert len(left - {"baseline", "mine"}) == 50
    assert "mine" in refs
    assert "20200101-000000-old" not in left
    assert len(list((records / "baseline").iterdir())) == 50
    assert len(left & set(refs) & {path.name for path in records.iterdir()}) == 1  # this run's


def test_documented_command_removes_all_that_runs_keep(repo: Repository, agent: Any) -> None:
    readme = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ *(git for-each-ref .*agent-runner.*)$", readme, re.MULTILINE)
    before = repo.state()
    assert repo.run("issue-to-pr", *CHEAP, agent=agent("open('new.txt', 'w').write('new'); exit(1)")).status == 4
    assert repo.git("for-each-ref", "refs/agent-runner")
    subprocess.run(["sh", "-c", command], cwd=repo.path, check=True)
    assert not repo.git("for-each-ref", "refs/agent-runner")
    assert not (repo.path / ".git" / "agent-runner").exists()
    assert repo.state() == before


# ---------------------------------------------------------------------------------------- full disk

NEW_MOUNTS = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
WRITES_MUCH = "import os\nopen('new.bin', 'wb').write(os.urandom(4_000_000))"


def on_small_disk(folder: Path, script: str, *, agent: str) -> list[str]:
    """The output of a script in a world of mounts of its own, where a folder has three megabytes of room."""
    probe = subprocess.run([*NEW_MOUNTS, 'mount -t tmpfs -o size=3m none "$0"', str(folder)], capture_output=True)
    if not shutil.which("unshare") or probe.returncode != 0:
        pytest.skip("needs unshare(1) and the right to mount")
    command = shlex.join([sys.executable, str(PROGRAM), "issue-to-pr", *CHEAP, "--sandbox", "off"])
    text = f'mount -t tmpfs -o size=3m none "$0"\n{script}'.replace(
        "RUN", f"{command} 2>&1 && echo status 0 || echo status $?"
    )
    env = os.environ | {"AGENT_CMD": agent}
    words = [*NEW_MOUNTS, f"exec 2>&1\n{text}", str(folder)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_disk_that_fills_up_while_cloning_is_told_plainly(
    repo: Repository, agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo.path / "large.bin").write_bytes(os.urandom(4_000_000))
    repo.commit()
    before = repo.state()
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(small))
    lines = on_small_disk(small, f"cd {repo.path}; RUN; ls -A {small}/agent-runner", agent=agent("pass"))
    assert "status 3" in lines, lines
    assert [line for line in lines if line.startswith("REFUSED (exit 3)") and "free on the disk of" in line], lines
    assert lines[-1] == "lock"
    assert repo.state() == before


def test_disk_that_fills_up_while_keeping_the_work_costs_no_work(repo: Repository, agent: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = f"""
        cp -R {repo.path} "$0"/app; cd "$0"/app
        RUN
        mount -o remount,size=20m "$0"
        git fsck --no-dangling --no-progress; git status --porcelain; git for-each-ref --format='ref %(refname)'
        AGENT_CMD=true; RUN
        git for-each-ref --format='%(refname)' refs/agent-runner >kept; git ls-tree -l $(cat kept) new.bin
    """
    lines = on_small_disk(small, script, agent=agent(WRITES_MUCH))
    after = lines.index("status 3")
    assert [line for line in lines[:after] if line.startswith("REFUSED (exit 3)") and "No space left" in line], lines
    assert lines[after + 1] == "ref refs/heads/main"
    assert lines[-2] == "status 4", lines
    assert "4000000\tnew.bin" in lines[-1]
    assert "Traceback" not in "".join(lines)
