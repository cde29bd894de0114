"""Real Git in temporary repositories, real child processes; nothing of our own is mocked."""

from __future__ import annotations

import json
import os
import py_compile
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "agent_runner.py"
# Compiled once for all the runs; as a script it would be compiled anew in each.
py_compile.compile(str(PROGRAM), doraise=True)
STARTER = f"""
import sys
sys.path[0], sys.argv[0] = {str(ROOT)!r}, {str(PROGRAM)!r}
import agent_runner
del sys.path[0]
sys.exit(agent_runner.cli())
"""
# A gate that costs a few milliseconds, for tests whose subject is not the gate.
CHEAP_GATE = f"{shlex.quote(sys.executable)} -S -c pass"


# Nothing of this machine's user decides anything. (pytest prints more of a failure in CI.)
THEIRS = (
    *("GIT_", "AGENT_", "XDG_", "GH_", "GITHUB_", "GITLAB_", "GITEA_", "FORGEJO_", "ACTIONS_"),
    *("CI_", "PYTEST_ADDOPTS", "VIRTUAL_ENV", "UV_"),
)
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith(THEIRS) and k != "CI"} | {
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
}


def isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    """An empty HOME, and nothing of this machine's user in the environment."""
    home.mkdir()
    for name in os.environ.keys() - ENVIRON.keys() - {"PYTEST_CURRENT_TEST"}:
        patch.delenv(name)
    for name, value in (ENVIRON | {"HOME": str(home)}).items():
        patch.setenv(name, value)


@pytest.fixture(autouse=True)
def hermetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME, a cache, a Git configuration and an environment of the test's own."""
    isolate(monkeypatch, tmp_path / "home")
    return tmp_path / "home"


def heed_signals() -> None:
    """In a child: these tests may run under nohup, which has their children ignore a hang-up."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Result(NamedTuple):
    """What a run of the program left: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The report of a run with --json."""
        found: dict[str, Any] = json.loads(self.out)
        return found


class Repository:
    """A temporary repository of a user's, with the handful of questions that the tests ask."""

    def __init__(self, path: Path, environ: dict[str, str] | None = None) -> None:
        self.path = path
        self.environ = environ  # None: the one of the test that is running

    def git(self, *words: str, check: bool = True) -> str:
        words = ("git", "-C", str(self.path), *words)
        done = subprocess.run(words, env=self.environ, capture_output=True, check=False)
        assert not check or done.returncode == 0, done.stderr.decode()
        return os.fsdecode(done.stdout).strip()

    def write(self, name: str, text: str, *, mode: int | None = None) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        if mode is not None:
            path.chmod(mode)
        return path

    def commit(self, message: str = "work") -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def run(
        self,
        *words: str,
        agent: str | None = None,
        cwd: str = "",
        env: Mapping[str, str | None] | None = None,
        stdin: str = "",
        under: Sequence[str] = (),
        program: Path = PROGRAM,
    ) -> Result:
        """Run the program as its users do: as a child process, in the repository."""
        changes = {"AGENT_CMD": agent} | dict(env or {}) if agent is not None else dict(env or {})
        environ = {
            k: v for k, v in (dict(self.environ or os.environ) | changes).items() if v is not None
        }
        start = ["-c", STARTER] if program == PROGRAM else [str(program)]
        argv = [*under, sys.executable, *start, *words]
        place, given = self.path / cwd, stdin.encode()
        how: dict[str, Any] = {"capture_output": True, "input": given, "timeout": 120}
        done = subprocess.run(argv, cwd=place, env=environ, preexec_fn=heed_signals, **how)
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return Result(done.returncode, out, err)

    def state(self) -> dict[str, str]:
        """All that a run must leave alone: refs, HEAD, index, configuration, hooks, and each file.

        Refs and records of the program's own (`agent/…`, `refs/agent-runner/…`) are left out.
        """
        refs = self.git("show-ref", "--head", check=False).splitlines()
        found = {"refs": "\n".join(line for line in refs if "agent-runner/" not in line)}
        found["HEAD"] = self.git("symbolic-ref", "-q", "HEAD", check=False)
        found["index"] = self.git("ls-files", "-s", "-v")
        found["stash"] = self.git("stash", "list")
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            inside = name.startswith(".git/")
            if not file.is_dir() and (
                not inside or name in (".git/config", ".git/info/exclude") or "/hooks/" in name
            ):
                found[name] = os.readlink(file) if file.is_symlink() else file.read_bytes().hex()
        return found

    def tree(self, ref: str) -> str:
        return self.git("rev-parse", f"{ref}^{{tree}}")


def small_app(path: Path) -> Repository:
    """A small app with a passing test, committed on `main`."""
    made = Repository(path)
    path.mkdir()
    made.git("init", "-q", "-b", "main")
    made.git("config", "user.name", "Ada")
    made.git("config", "user.email", "ada@example.invalid")
    made.write("calc.py", "def double(x):\n    return x * 2\n")
    test = "from calc import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    made.write("test_calc.py", test)
    made.write("issue.md", "# Triple a number\n\n`triple(x)` in calc.py returns three times x.\n")
    made.commit("start")
    return made


@pytest.fixture(scope="session")
def small_app_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small app, made once: each test gets a copy."""
    place = tmp_path_factory.mktemp("small") / "app"
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, place.parent / "home")
        small_app(place)
    return place


@pytest.fixture
def repo(tmp_path: Path, small_app_files: Path) -> Repository:
    """A small app with a passing test, committed on `main`."""
    shutil.copytree(small_app_files, tmp_path / "app", symlinks=True)
    return Repository(tmp_path / "app")


@pytest.fixture
def broken(repo: Repository) -> Repository:
    """The same app with a bug that its committed test shows."""
    repo.write("calc.py", "def double(x):\n    return x + 2\n")
    repo.commit("break it")
    return repo


def make_agent(place: Path, text: str, *, arguments: str = "") -> str:
    """The command of an agent of a few lines: Python, or a shell script if it starts with #!."""
    text = textwrap.dedent(text).lstrip()
    shell = text.startswith("#!")
    path = place / f"agent-{len(list(place.glob('agent-*')))}{'.sh' if shell else '.py'}"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    words = [str(path)] if shell else [sys.executable, "-S", str(path)]
    return f"{shlex.join(words)} {arguments}".strip()


@pytest.fixture
def agent(tmp_path: Path) -> Any:
    return partial(make_agent, tmp_path)


def bwrap_works() -> bool:
    """Does the kernel level work on this machine?"""
    words = ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--dev", "/dev"]
    words += ["--proc", "/proc", "true"]
    found = shutil.which("bwrap") is not None
    return found and subprocess.run(words, capture_output=True).returncode == 0


needs_bwrap = pytest.mark.skipif(not bwrap_works(), reason="bubblewrap does not work here")
# Both levels of the guard, where this machine has both.
LEVELS = [pytest.param("off", id="no-kernel")]
LEVELS += [pytest.param("require", id="kernel", marks=needs_bwrap)]
