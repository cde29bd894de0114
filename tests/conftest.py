"""Real Git in temporary repositories, real child processes; nothing of the program's own is mocked."""

from __future__ import annotations

import inspect
import json
import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
sys.path.insert(0, str(ROOT))  # for the tests that call the program's functions
# A gate that costs a few milliseconds, for tests whose subject is not the gate.
CHEAP_GATE = f"{shlex.quote(sys.executable)} -S -c pass"


# Nothing of this machine's user decides anything. (pytest prints more of a failure in CI.)
THEIRS = tuple("GIT_ AGENT_ XDG_ GH_ GITHUB_ GITLAB_ GITEA_ FORGEJO_ ACTIONS_ CI_ PYTEST_ADDOPTS".split())  # noqa: SIM905
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(THEIRS) and name != "CI"} | {
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
}


def isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    """An empty HOME, and an environment in which nothing of this machine's user decides anything."""
    home.mkdir()
    for name in os.environ.keys() - ENVIRON.keys() - {"PYTEST_CURRENT_TEST"}:
        patch.delenv(name)
    for name, value in (ENVIRON | {"HOME": str(home)}).items():
        patch.setenv(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those who run ahead are asked last."""
    items.sort(key=lambda item: hasattr(getattr(item, "module", None), "run_ahead"))


@pytest.fixture(scope="session", autouse=True)
def ahead(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What modules with a `run_ahead` have started, beside the tests of all the others."""
    modules = {item.module for item in request.session.items if hasattr(item, "module")}
    found = {
        module.__name__: module.run_ahead(request.session.items, tmp_path_factory.mktemp(module.__name__))
        for module in modules
        if hasattr(module, "run_ahead")
    }
    yield found
    for bench in found.values():
        bench.pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def hermetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME, a cache, a Git configuration and an environment of the test's own."""
    isolate(monkeypatch, tmp_path / "home")
    return tmp_path / "home"


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
        """Run the program as its users do: as a child process, in the repository, `under` another if one is given."""
        changes = {"AGENT_CMD": agent} | dict(env or {}) if agent is not None else dict(env or {})
        environ = {k: v for k, v in (dict(self.environ or os.environ) | changes).items() if v is not None}
        start = ["-c", STARTER] if program == PROGRAM else [str(program)]
        argv = [*under, sys.executable, *start, *words]
        done = subprocess.run(
            argv, cwd=self.path / cwd, env=environ, capture_output=True, input=stdin.encode(), timeout=120
        )
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def state(self) -> dict[str, str]:
        """All that a run must leave alone: refs, HEAD, index, configuration, hooks, and every file of the checkout.

        Refs and records of the program's own (`agent/…`, `refs/agent-runner/…`) are left out.
        """
        refs = [
            line for line in self.git("show-ref", "--head", check=False).splitlines() if "agent-runner/" not in line
        ]
        found = {"refs": "\n".join(refs), "HEAD": self.git("symbolic-ref", "-q", "HEAD", check=False)}
        found["index"] = self.git("ls-files", "-s", "-v")
        found["stash"] = self.git("stash", "list")
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            inside = name.startswith(".git/")
            if not file.is_dir() and (not inside or name in (".git/config", ".git/info/exclude") or "/hooks/" in name):
                found[name] = os.readlink(file) if file.is_symlink() else file.read_bytes().hex()
        return found

    def tree(self, ref: str) -> str:
        return self.git("rev-parse", f"{ref}^{{tree}}")


_small_app: dict[Path, bytes | None] = {}  # made once, for the time that seven processes take


def small_app(path: Path) -> Repository:
    """A small app with a passing test, committed on `main`."""
    made = Repository(path)
    made.path.mkdir()
    if _small_app:
        for name, data in _small_app.items():
            (path / name).mkdir() if data is None else (path / name).write_bytes(data)
        return made
    made.git("init", "-q", "-b", "main")
    made.git("config", "user.name", "Ada")
    made.git("config", "user.email", "ada@example.invalid")
    made.write("calc.py", "def double(x):\n    return x * 2\n")
    made.write("test_calc.py", "from calc import double\n\n\ndef test_double():\n    assert double(3) == 6\n")
    made.write("issue.md", "# Triple a number\n\n`triple(x)` in calc.py returns three times x.\n")
    made.commit("start")
    for file in sorted(path.rglob("*")):
        _small_app[file.relative_to(path)] = None if file.is_dir() else file.read_bytes()
    return made


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    """A small app with a passing test, committed on `main`."""
    return small_app(tmp_path / "app")


@pytest.fixture
def broken(repo: Repository) -> Repository:
    """The same app with a bug that its committed test shows."""
    repo.write("calc.py", "def double(x):\n    return x + 2\n")
    repo.commit("break it")
    return repo


def make_agent(place: Path, text: str, *, arguments: str = "") -> str:
    """The command of an agent of a few lines: Python by default, a shell script if its text starts with #!."""
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


class World:
    """What a test that runs side by side with others has for itself: a folder, the small app, agents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repo = small_app(path / "app")

    def agent(self, text: str) -> str:
        return make_agent(self.path, text)


def side_by_side(case: Callable[..., None]) -> Callable[..., None]:
    """Have a test, whose first argument is a `World`, run beside others of its module: two at a time."""
    names = ("outcome", *list(inspect.signature(case).parameters)[1:])

    def test(outcome: Future[None], **_: object) -> None:
        outcome.result()

    test.__name__, test.__doc__ = case.__name__, case.__doc__
    test.__dict__ |= {"case": case, "pytestmark": list(getattr(case, "pytestmark", []))}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    vars(test)["__signature__"] = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return test


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The outcome of each selected test of the module that is marked `side_by_side`."""
    place = tmp_path_factory.mktemp("beside")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        isolate(patch, place / "home")
        small_app(place / "app")
        found = {}
        for item in request.session.items:
            if not isinstance(item, pytest.Function) or item.module is not request.module:
                continue
            case, skipped = getattr(item.function, "case", None), item.iter_markers("skipif")
            if case and not any(mark.args[0] for mark in skipped):
                (folder := place / str(len(found))).mkdir()
                given = item.callspec.params if hasattr(item, "callspec") else {}
                found[item.nodeid] = pool.submit(lambda c, f, g: c(World(f), **g), case, folder, given)
        pool.shutdown()
        yield found
        left = [path for path in (place / "home").glob(".cache/agent-runner/*") if (path / "git").is_dir()]
        assert not left, f"every run removes its folder, and these are left: {left}"


@pytest.fixture
def outcome(outcomes: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return outcomes[request.node.nodeid]


def bwrap_works() -> bool:
    """Does the kernel level work on this machine?"""
    words: Sequence[str] = (
        "bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"
    )  # fmt: skip
    return bool(shutil.which("bwrap")) and subprocess.run(words, capture_output=True).returncode == 0


needs_bwrap = pytest.mark.skipif(not bwrap_works(), reason="bubblewrap does not work here")
# Both levels of the guard, where this machine has both.
LEVELS = [pytest.param("off", id="no-kernel"), pytest.param("require", id="kernel", marks=needs_bwrap)]
