"""The guard: what an agent tries that is not its business, and what becomes of it.

Each attack has its honest twin: a person who works in the repository meanwhile is never punished.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, PROGRAM, Repository, Result, needs_bwrap

PYTHON = f"{shlex.quote(sys.executable)} -S"
ISSUE = ("issue-to-pr", "issue.md", "--no-baseline", "--json", "--gate", CHEAP_GATE)
OFF = ("--sandbox", "off")
levels = pytest.mark.parametrize("level", LEVELS)

# What every agent here starts with: an honest piece of work, and a note of what it tries.
PRELUDE = """\
import contextlib, json, os, pathlib, subprocess, sys, time
HOME, told, tried = pathlib.Path.home(), {}, {}
GIT = ("git", "-c", "user.name=A", "-c", "user.email=a@example.invalid")
UNHOOKED = (*GIT, "-c", "core.hooksPath=/dev/null", "-C", REAL)
UNSEEN = ("env", "-i", "PATH=" + os.environ["PATH"], *UNHOOKED)

def run(kind, before, *lines):
    for line in lines:
        words = [*before, *(line.split() if isinstance(line, str) else line)]
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL)
        tried[f"{kind}: {line}"] = done.returncode, (done.stderr + done.stdout).decode()

def write(path, text, mode=0o644):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)

def can_write(path):
    with contextlib.suppress(OSError):
        return write(path, "0" * 40) is None

def work():
    with open("calc.py", "a") as file:
        file.write("\\n\\ndef triple(x):\\n    return x * 3\\n")

"""
TELL = "\nwrite(HOME / 'told.json', json.dumps(told | {'tried': tried}))\n"


def script(repo: Repository, code: str, *, work: str = "work()") -> str:
    """An agent's text. A word of its command that named the real path would be made the clone's."""
    return f"REAL = {str(repo.path)!r}\n{PRELUDE}{work}\n{code}{TELL}"


def act(repo: Repository, agent: Any, code: str, *words: str, **more: Any) -> Result:
    """Run an agent of a few lines on the issue, without a switch at the end."""
    return repo.run(*ISSUE, "--no-switch", *words, agent=agent(script(repo, code)), **more)


def told_by_agent() -> dict[str, Any]:
    text = Path(os.environ["HOME"], "told.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def state_of(path: Path) -> dict[str, str]:
    """All that must be as it was, proposals aside, and the refs of the remote on this disk."""
    state, remote = Repository(path).state(), path.parent / "remote.git"
    lines = state["refs"].splitlines()
    state["refs"] = "\n".join(line for line in lines if "refs/heads/agent/" not in line)
    return state | ({"remote": Repository(remote).git("show-ref")} if remote.exists() else {})


def difference(path: Path, before: dict[str, str]) -> set[str]:
    now = state_of(path)
    return {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}


def proposed(repo: Repository, result: Result) -> list[str]:
    """The files of the proposal; there must be one, on the base."""
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err[-2000:]
    words = ("diff", "--name-only", result.report["base"], result.report["branch"])
    return repo.git(*words).splitlines()


def shell(text: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", text], cwd=folder, check=True, capture_output=True)


# All that a run must leave alone: branches, tag, stash, hook, a work tree, remotes with news.
BUSY = """
git branch spare
git switch -q -c side; echo 'SIDE = 1' >side.py; git add side.py; git commit -q -m side
git switch -q main; git commit -q --allow-empty -m more; git tag v1
echo stashed >calc.py; git stash -q
git worktree add -q -b beside "$PWD/../beside"
git init -q --bare -b main ../remote.git; git push -q ../remote.git main
git remote add origin "$(realpath ../remote.git)"; git fetch -q origin
git remote add web https://forge.invalid/ada/app.git
git config remote.web.pushurl "file://$(realpath ../remote.git)"
new=$(git commit-tree -m news -p main main^{tree})
git push -q ../remote.git $new:refs/heads/main $new:refs/heads/other $new:refs/tags/v2
for hook in pre-push pre-commit commit-msg; do
    mkdir -p .git/hooks; echo '#!/bin/sh' >.git/hooks/$hook; chmod 755 .git/hooks/$hook
done
"""


def make_busy(place: Path, files: Path) -> Repository:
    """The small app with all that; its path is special to patterns."""
    shutil.copytree(files, place / "an [app] of *", symlinks=True)
    shell(BUSY, place / "an [app] of *")
    return Repository(place / "an [app] of *")


@pytest.fixture
def busy(tmp_path: Path, small_app_files: Path) -> Repository:
    return make_busy(tmp_path, small_app_files)


# ---------------------------------------------------------------------------------------- withheld

LOGINS = (
    *("GH_TOKEN", "GITHUB_TOKEN", "GH_ENTERPRISE_TOKEN", "GITLAB_ACCESS_TOKEN", "GITEA_TOKEN"),
    *("FORGEJO_TOKEN", "CI_JOB_TOKEN", "ACTIONS_RUNTIME_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL"),
    *("GITHUB_ENV", "GITHUB_OUTPUT", "SSH_AUTH_SOCK", "SSH_ASKPASS", "SUDO_ASKPASS", "GIT_DIR"),
    *("GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG_PARAMETERS"),
    *("GIT_ASKPASS", "CLAUDECODE", "CLAUDE_CODE_ENTRYPOINT", "CODEX_SANDBOX", "AGENT_RUNNER_ANY"),
)
KEPT = ("GITLAB_TOKEN", "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "EDITOR_OF_MINE")
DUMP = """
import json, os, pathlib, sys
told = {"environ": dict(os.environ)}
try:
    told["terminal"] = str(open("/dev/tty"))
except OSError as error:
    told["terminal"] = error.strerror
(pathlib.Path.home() / f"{sys.argv[1]}.json").write_text(json.dumps(told))
if sys.argv[1] == "agent":
    open("calc.py", "a").write("# work\\n")
"""
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@levels
def test_logins_git_settings_nesting_and_the_terminal_are_withheld_from_everyone(
    repo: Repository, tmp_path: Path, hermetic: Path, level: str
) -> None:
    (tmp_path / "dump.py").write_text(DUMP)
    dump = f"{PYTHON} {shlex.quote(str(tmp_path / 'dump.py'))}"
    words = ["--gate", f"{dump} gate", "--setup", f"{dump} setup", "--keep-env", "GITLAB_TOKEN"]
    result = repo.run(
        *("issue-to-pr", "issue.md", "--no-baseline", "--sandbox", level, *words),
        agent=f"{dump} agent",
        env={name: f"value of {name}" for name in (*LOGINS, *KEPT)},
        under=(sys.executable, "-c", TERMINAL),
    )
    assert result.status == 0, result.out
    temporary = {}
    for who in ("agent", "setup", "gate"):
        told = json.loads((hermetic / f"{who}.json").read_text())
        environ, temporary[who] = told["environ"], told["environ"]["TMPDIR"]
        assert not [name for name in LOGINS if environ.get(name) == f"value of {name}"], who
        assert all(environ[name] == f"value of {name}" for name in KEPT), who
        assert environ["HOME"] == str(hermetic)
        assert told["terminal"] == "No such device or address"
    assert temporary["agent"] != temporary["gate"]
    assert not any(os.path.exists(place) for place in temporary.values())


SECRET = {"SERVICE_API_KEY": "not-for-anyone-1", "TWO_LINE_SECRET": 'quo"ted-2é\nsecond-line-3'}
PARTS = ("not-for-anyone-1", "ted-2é", "second-line-3")
LEAKS = f"""
secrets = [os.environ[name] for name in {[*SECRET]!r}]
print(*secrets, "x" * 70_000 + secrets[0], flush=True)
print(*secrets, file=sys.stderr)
name = "os.environ['SERVICE_API_KEY']"
"""


@pytest.mark.parametrize(("line", "rejects"), [("repr(secrets[0])", True), ("name", False)])
def test_secret_is_masked_wherever_it_is_told_and_rejects_in_an_added_line(
    repo: Repository, agent: Any, line: str, rejects: bool
) -> None:
    code = f"{LEAKS}write('notes.py', 'import os\\nKEY = ' + {line} + '\\n')"
    result = act(repo, agent, code, *OFF, env=SECRET)
    found = [f for f in result.report["findings"] if f["severity"] == "rejects"]
    told = [(f["kind"], f["path"], f["line"]) for f in found]
    assert (result.status, told) == ((1, [("secret", "notes.py", 2)]) if rejects else (0, []))
    record = [p for p in Path(result.report["record"]).rglob("*") if p.is_file()]
    texts = {str(p): p.read_text("utf-8", "replace") for p in record}
    texts |= {"stdout": result.out, "stderr": result.err}
    assert not [(name, part) for name in texts for part in PARTS if part in texts[name]]
    assert "[withheld]" in result.err


# ---------------------------------------------- an agent that takes the real repository for its own

CONFUSED = """
place, own = os.path.dirname(REAL), os.environ["TMPDIR"] + "/own"
remote = f"{place}/remote.git"
commands = ("commit -q --allow-empty -m mine", "branch mine", "branch -f side", "branch -D side",
            "tag mine", "tag -d v1", "stash store HEAD", "update-ref refs/heads/main HEAD~1",
            "update-ref refs/notes/mine HEAD", "merge -q side", "switch -c mine",
            "reset -q --hard side", "commit -q --no-verify --allow-empty -m mine",
            "fetch -q . HEAD:refs/heads/mine", "fetch -q origin main:theirs")
run("real", (*GIT, "-C", REAL), *commands)
run("beside", (*GIT, "-C", f"{place}/beside"), *commands[:5])
pushes = ("origin HEAD:evil", "--force --no-verify origin main:side", "web main:evil")
addresses = [[option, address, "HEAD:evil"] for option in ("-q", "--no-verify")
             for address in (remote, f"file://{remote}", f"{remote}/")]
run("push", (*GIT, "-C", REAL, "push"), *pushes, *addresses)
run("push here", (*GIT, "push"), *addresses)
run("real push", (*GIT, "push", "--force"), [REAL, "HEAD:evil"], [f"file://{REAL}", "HEAD:evil"])
run("tool", (), "gh pr create", "glab mr create", "tea pr create")
run("login", ("sh", "-c"), ["echo url=https://forge.invalid | git credential fill"])
run("login", GIT, "ls-remote ssh://git@forge.invalid/ada/app.git")

run("own", GIT, "commit -q --allow-empty -m mine", "switch -q -c here", "tag here", "stash list")
run("own", GIT, ["init", "-q", "-b", "main", own])
write(f"{own}/.git/hooks/reference-transaction", "#!/bin/sh\\ntouch ran\\n", 0o755)
run("own", (*GIT, "-C", own), "commit -q --allow-empty -m theirs", "branch -f more")
run("own", GIT, ["clone", "-q", own, own + "-2"], ["-C", own + "-2", "push", "origin", "HEAD:x"])
run("own", GIT, ["clone", "-q", ".", own + "-3"])
told["its hook ran"] = os.path.exists(own + "/ran")
"""


@levels
def test_git_changes_no_ref_of_the_real_repository_nor_of_its_remotes(
    busy: Repository, agent: Any, hermetic: Path, level: str
) -> None:
    helper, before = hermetic / "asked", state_of(busy.path)
    (hermetic / ".gitconfig").write_text(f'[credential]\n\thelper = "!touch {helper}; echo"\n')
    result = act(busy, agent, CONFUSED, "--sandbox", level)
    assert proposed(busy, result) == ["calc.py"]
    told = told_by_agent()
    kinds = {"own"} | ({"real", "real push"} if level == "require" else set())  # there, the clone
    worked = {line for line, (status, _) in told["tried"].items() if status == 0}
    assert not [line for line in worked if line.partition(":")[0] not in kinds]
    assert {line for line in told["tried"] if line.startswith("own")} <= worked
    assert told["its hook ran"] and not helper.exists()
    # Git resets files before it asks whether the branch may move.
    assert difference(busy.path, before) <= ({"side.py", "index"} if level == "off" else set())
    assert not [moved for moved in result.report["moved"] if moved["broken"]]
    said = {line: text for line, (_, text) in told["tried"].items()}
    ours = ("tool", "real:", "beside") if level == "off" else ("tool",)
    assert not [line for line in said if line.startswith(ours) and "agent_runner" not in said[line]]


SUBMODULE = """
git -c protocol.file.allow=always submodule add -q "$(realpath ../remote.git)" sub
git commit -q -m sub; git -C sub config user.name Ada; git -C sub config user.email a@b.invalid
"""


@levels
@pytest.mark.parametrize("where", ["beside", "app/sub", "app"])
def test_the_guard_holds_in_a_linked_work_tree_in_a_submodule_and_above_one(
    busy: Repository, tmp_path: Path, agent: Any, where: str, level: str
) -> None:
    if "app" in where:
        shell(SUBMODULE, busy.path)
    start = Repository(tmp_path / where.replace("app", busy.path.name))
    places = {"app/sub": [start.path], "app": [busy.path, busy.path / "sub"]}.get(where, [])
    places = places or [start.path, busy.path]
    before = [state_of(path) for path in places]
    code = f"""
for path in {[str(path) for path in places]!r}:
    run("real", (*GIT, "-C", path), "commit -q --allow-empty -m mine", "tag mine")
told["main"] = os.listdir(REAL)
"""
    words = (*ISSUE, "--no-switch", "--sandbox", level)
    result = start.run(*words, agent=agent(script(busy, code)))
    assert proposed(start, result) == ["calc.py"]
    assert [difference(*each) for each in zip(places, before, strict=True)] == [set()] * len(places)
    told = told_by_agent()
    assert level != "off" or all(status for status, _ in told["tried"].values())
    if (where, level) == ("beside", "require"):
        assert set(told["main"]) <= {".git"}  # its other checkouts are hidden


# ----------------------------------------------- an agent that goes round Git, and no kernel level

# What it does, and the words with which the run must tell it.
TAMPERING = {
    "hooks off": (
        "run('', UNHOOKED, 'commit -q --allow-empty -m mine', 'tag mine')",
        "heads/main was moved, tags/mine was created",
    ),
    "unseen": (
        """run("", UNSEEN, "tag -d v1", "branch -f side main", "branch -D spare", "stash drop",
    "update-ref refs/notes/mine HEAD", "branch mine", f"worktree add -b elsewhere {HOME}/mine",
    ["push", "-q", f"{os.path.dirname(REAL)}/./remote.git", "main:refs/heads/pushed"])""",
        "tags/v1 was deleted, heads/side was moved, spare was deleted, refs/stash was deleted, "
        "notes/mine, heads/mine was created, heads/pushed of , heads/elsewhere was created",
    ),
    "by hand": (
        """side = pathlib.Path(REAL, ".git/refs/heads/side").read_text()
write(REAL + "/.git/refs/heads/mine", side)
write(REAL + "/.git/refs/heads/spare", "ref: refs/heads/side\\n")
write(REAL + "/.git/packed-refs", side.strip() + " refs/tags/planted\\n")""",
        "heads/mine was created, heads/spare was moved, tags/planted was created",
    ),
    "history": ("run('', UNSEEN, 'update-ref refs/heads/main HEAD~1')", "heads/main was moved"),
    "HEAD": ("run('', UNHOOKED, 'checkout -q side')", "HEAD was moved"),
    "its own work committed": (
        "write(REAL + '/calc.py', open('calc.py').read()); run('', UNSEEN, 'commit -qam mine')",
        "heads/main was moved",
    ),
}


def broke_the_rule(repo: Repository, result: Result) -> list[dict[str, Any]]:
    """What broke it, all of it told; the work must be kept and no branch made."""
    report = result.report
    assert (result.status, report["outcome"]) == (5, "rule-broken"), result.err[-2000:]
    assert "agent/" not in repo.git("for-each-ref", "refs/heads")
    assert "triple" in repo.git("show", f"{report['kept']}:calc.py")
    broken = [moved for moved in report["moved"] if moved["broken"]]
    told = " ".join(result.err.split())
    assert all(" ".join(moved["what"].split()) in told for moved in broken)
    return broken


@pytest.mark.parametrize("name", TAMPERING)
def test_refs_that_an_agent_moved_are_found_and_undone_by_the_commands_told(
    busy: Repository, agent: Any, name: str
) -> None:
    (code, words), before = TAMPERING[name], state_of(busy.path)
    result = act(busy, agent, code, *OFF)
    broken = broke_the_rule(busy, result)
    what = "; ".join(moved["what"] for moved in broken)
    assert not [word for word in words.split(", ") if word not in what], what
    assert "if that was not you" in result.err
    for moved in broken:
        shell(moved["undo"], busy.path)
    assert difference(busy.path, before) <= {"calc.py", "index", "stash"}


FILES = """
run("", UNSEEN, "config remote.origin.url https://elsewhere.invalid/x")
hooks = pathlib.Path(REAL, ".git/hooks")
write(hooks / "post-checkout", "#!/bin/sh\\n", 0o755)
os.unlink(hooks / "pre-push")
os.chmod(hooks / "pre-commit", 0o644)
write(hooks / "commit-msg", "#!/bin/sh\\nexit 0\\n", 0o755)
os.mkfifo(hooks / "post-merge")
write(REAL + "/.git/info/attributes", "* filter=x\\n")
write(HOME / ".gitconfig", "[a]\\n\\tb = c\\n")
write(REAL + "/agent_runner.py", "mine")
write(REAL + "/.venv/lib/python3/site-packages/planted.pth", "import evil")
"""
CHANGED = {
    *("config was changed", "post-checkout was created", "pre-push was deleted"),
    *("pre-commit was changed", "commit-msg was changed", "post-merge was created"),
    *("attributes was created", ".gitconfig was created", "agent_runner.py was changed"),
}


def test_configuration_hooks_program_and_environment_that_an_agent_changed_are_found(
    busy: Repository, agent: Any
) -> None:
    own = Path(shutil.copy(PROGRAM, busy.path / "agent_runner.py"))
    busy.write(".git/info/exclude", ".venv\n")
    busy.write(".venv/pyvenv.cfg", "")
    busy.write(".venv/bin/checker", "#!/bin/sh\n", mode=0o755)
    busy.write(".venv/lib/python3/site-packages/one.py", "")
    result = act(busy, agent, FILES, *OFF, "--gate", "checker", program=own)
    broken = broke_the_rule(busy, result)
    assert {moved["what"].rpartition("/")[2] for moved in broken} == CHANGED
    mentions = " ".join(result.report["mentions"])
    assert "planted.pth" in mentions and "pip install" in mentions


RUINS = [
    "import shutil; shutil.rmtree(REAL + '/.git')",
    "write(REAL + '/.git/HEAD', 'nothing\\n'); write(REAL + '/.git/config', '[[[')",
]


@pytest.mark.parametrize("code", RUINS, ids=["deleted", "unreadable"])
def test_an_agent_that_ruins_the_repository_broke_the_rule_and_its_work_is_kept(
    repo: Repository, agent: Any, hermetic: Path, code: str
) -> None:
    result = act(repo, agent, code, *OFF)
    kept = [*hermetic.glob(".cache/agent-runner/*/workspace*/app/calc.py")]
    kept += repo.path.glob(".git/agent-runner/*/change.patch")
    assert any("triple" in path.read_text() for path in kept)
    assert (result.status, result.report["outcome"]) == (5, "rule-broken"), result.err


# ------------------------------------------- an agent that looks for a way out of the kernel level

STORES = ".ssh/id .netrc .git-credentials .config/gh/hosts.yml .gnupg/key .config/tea/config.yml"
HOSTILE = """\
import ctypes, glob, socket
place, cache = pathlib.Path(REAL).parent, HOME / ".cache/agent-runner"
told["beside"] = os.listdir(place / "beside")
roots = ["", "/proc/self/root", "/proc/1/root", *glob.glob("/proc/[0-9]*/cwd/../..")]
for number, root in enumerate(roots):
    for file in (".git/refs/heads/planted", "../beside/planted"):
        can_write(f"{root}{REAL}/{file}{number}")
run("own", UNSEEN, "commit -q --allow-empty -m mine", "tag -f v1", "branch -f side", "config a.b c")
run("push", UNHOOKED, ["push", "--force", f"{place}/remote.git", "HEAD:main"])
libc = ctypes.CDLL(None, use_errno=True)
out = told["ways out"] = {"root": libc.mount(None, b"/", None, 32 | 4096, None)}
for target in (REAL, f"{place}/beside", f"{cache}", f"{HOME}/.ssh"):
    out["umount " + target] = libc.umount2(target.encode(), 2)
    out["bind over " + target] = libc.mount(b"/tmp", target.encode(), None, 4096, None)
run("out", ("unshare", "-Urm"), ["umount", "-l", REAL], "mount -o remount,rw,bind /")
out |= {name: tried[name][0] for name in tried if name.startswith(("out", "push"))}
out["login agent"] = socket.socket(socket.AF_UNIX).connect_ex(f"{place}/login")
told["uid"], told["pids"] = os.getuid(), [int(p) for p in os.listdir("/proc") if p.isdigit()]
told["cwd"], told["real"] = os.getcwd(), os.listdir(REAL)
told["records and hooks"] = [*glob.glob(f"{glob.escape(REAL)}/.git/[ah][go]*/*")]
told["runs"] = [os.listdir(cache), os.listdir(cache / os.environ["AGENT_RUNNER_RUN"])]
stores = [HOME / name for name in STORES.split()]
told["stores"] = [str(path) for path in stores if path.exists() and path.read_text()]
ground = (os.path.dirname(os.path.realpath(sys.executable)), sys.prefix, HOME / ".local/lib",
          HOME / ".config/git", place / "bin", place / "hooks", REAL + "/.venv", "/usr/bin",
          place / "remote.git/refs/heads", HOME / "runner")
told["ground"] = [str(path) for path in ground if can_write(f"{path}/planted")]
free = (HOME, HOME / ".cache", HOME / ".cargo/registry", os.environ["TMPDIR"], place / "free")
told["free"] = [can_write(f"{path}/planted") for path in free]
run("own", ("bwrap", "--unshare-user"), "--ro-bind / / --dev /dev --proc /proc true")
"""
PREPARE = """
cd ..; mkdir -p home/.local/lib home/.config/git home/.cache/agent-runner/other hooks free bin
mkdir home/runner
for store in {stores}; do mkdir -p home/$(dirname $store); echo secret >home/$store; done
printf '#!/bin/sh\\n' >bin/checker; chmod 755 bin/checker
"""


# Reads a clone's objects as some libraries do (GitPython's): from one folder to those it borrows.
BORROWED = """
def follow(folder, *before):
    path = pathlib.Path(folder, "info/alternates")
    lines = path.read_text().split("\\n") if path.exists() else []
    told["circle"] = told.get("circle") or folder in before
    for line in filter(None, () if folder in before else lines):
        follow(line, folder, *before)

follow(os.path.realpath(".git/objects"))
"""


@levels
def test_borrowed_objects_lead_in_no_circle(repo: Repository, agent: Any, level: str) -> None:
    result = act(repo, agent, BORROWED, "--sandbox", level)
    assert proposed(repo, result) and told_by_agent()["circle"] is False


@needs_bwrap
def test_under_the_kernel_level_no_way_leads_out_of_the_clone(
    busy: Repository, tmp_path: Path, agent: Any
) -> None:
    """An agent that knows every path; and its twin, that all a tool needs at home still works."""
    shell(PREPARE.format(stores=STORES), busy.path)
    busy.git("config", "core.hooksPath", str(tmp_path / "hooks"))
    busy.write(".git/info/exclude", ".venv\n")
    busy.write(".venv/pyvenv.cfg", "")
    before, code = state_of(busy.path), f"STORES = {STORES!r}\n{HOSTILE}"
    words = ("--sandbox", "require", "--writable", str(tmp_path / "free"), "--gate", "checker")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with socket.socket(socket.AF_UNIX) as login:
        login.bind(str(tmp_path / "login"))
        login.listen()
        env = {"PATH": path, "SSH_AUTH_SOCK": str(tmp_path / "login")}
        env |= {"RUNNER_TEMP": str(tmp_path / "home/runner")}
        result = act(busy, agent, code, *words, env=env)
    assert proposed(busy, result) == ["calc.py"]
    assert difference(busy.path, before) == set() and result.report["moved"] == []
    assert not [name for name in os.listdir(tmp_path / "beside") if "planted" in name]
    told = told_by_agent()
    assert not [way for way, status in told["ways out"].items() if status == 0]
    assert told["uid"] != 0
    assert os.getpid() not in told["pids"] and max(told["pids"]) < 1000
    assert told["cwd"] == str(busy.path) and {"calc.py", ".git"} <= set(told["real"])
    runs, own = told["runs"]  # other runs, checkouts, hooks and records cannot be seen
    assert told["records and hooks"] == told["beside"] == [] and len(runs) == 1
    assert not [name for name in own if name.startswith(("workspace", "judge", "index"))]
    assert told["stores"] == []  # hidden
    assert told["ground"] == []  # read-only: what the judge stands on, and remotes on this disk
    assert all(told["free"])
    assert not {n: t for n, t in told["tried"].items() if n.startswith("own") and t[0]}


# ------------------------------------------------------------ the honest twins: a person, meanwhile

WAIT = """
(HOME / "started").touch()
while not (HOME / "go").exists():
    time.sleep(0.01)
"""


def run_beside(
    repo: Repository, agent: Any, level: str, person: Callable[[], object], *, work: str = "work()"
) -> Result:
    """A run whose agent waits until a person has done something in the repository."""
    home, command = Path(os.environ["HOME"]), agent(script(repo, WAIT, work=work))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: repo.run(*ISSUE, "--sandbox", level, agent=command))
        try:
            while not (home / "started").exists():
                assert not future.done(), future.result().err
                time.sleep(0.01)
            person()
        finally:
            (home / "go").touch()
        return future.result()


PEOPLE = {
    "commits and goes on": """
        echo 'OWN = 1' >own.py; git add own.py; git commit -q -m own
        echo edited >calc.py; echo staged >test_calc.py; git add test_calc.py; echo new >new.py
    """,
    "edits and stages": "echo edited >calc.py; echo 'ADDED = 1' >added.py; git add added.py",
    "switches": "git switch -q side; echo edited >side.py",
    "starts a branch": "git switch -q -c mine; echo 1 >own.py; git add .; git commit -qm own",
    "pulls, and works elsewhere": """
        git fetch -q origin; git merge -q --ff-only origin/main
        git -C ../beside commit -q --allow-empty -m beside
    """,
}
TIDIES_UP = """
    git tag -f v1; git branch -D spare; git stash drop; git config a.b c
    git commit -q --amend --allow-empty -m amended; echo 'exit 1' >.git/hooks/pre-push
"""


@levels
@pytest.mark.parametrize("name", PEOPLE)
def test_a_person_at_work_meanwhile_is_not_punished_and_loses_nothing(
    busy: Repository, agent: Any, name: str, level: str
) -> None:
    left: dict[str, str] = {}
    more = TIDIES_UP if level == "require" else ""  # without the kernel, it might be the agent

    def person() -> None:
        shell(PEOPLE[name] + more, busy.path)
        left.update(state_of(busy.path))

    result = run_beside(busy, agent, level, person)
    assert proposed(busy, result) == ["calc.py"]  # nothing of theirs is swept in
    assert not [moved for moved in result.report["moved"] if moved["broken"]]
    assert difference(busy.path, left) == set()
    mentions = " ".join(result.report["mentions"])
    assert "during the run" in mentions and "HEAD was left where it is" in mentions


@levels
def test_an_edited_checkout_beside_an_agent_that_changed_nothing_is_explained(
    repo: Repository, agent: Any, level: str
) -> None:
    """It may be a daemon of the agent's own, which works outside every sandbox."""
    edit = repo.path / "calc.py"
    result = run_beside(repo, agent, level, lambda: edit.write_text("edited\n"), work="")
    assert (result.status, result.report["outcome"]) == (5, "rule-broken"), result.err
    assert "calc.py" in result.report["message"] and "daemon" in result.report["message"]
    assert edit.read_text() == "edited\n"


def test_a_folder_that_is_no_repository_as_a_remote_disturbs_no_run(
    busy: Repository, tmp_path: Path, agent: Any
) -> None:
    place = tmp_path / "elsewhere.git"
    place.mkdir()
    busy.git("remote", "add", "elsewhere", str(place))
    assert proposed(busy, act(busy, agent, "", *OFF)) == ["calc.py"]


# --------------------------------------------------------------------------- what outlives an agent


@needs_bwrap
def test_program_planted_in_a_folder_of_path_is_run_by_nobody(
    repo: Repository, agent: Any, hermetic: Path
) -> None:
    """As pipx and others set it up; and its twin, a tool of the agent's own elsewhere in HOME."""
    tools, mark = hermetic / ".local/bin", hermetic / "ran"
    tools.mkdir(parents=True)
    path = os.pathsep.join((str(hermetic / "none"), str(tools), os.environ["PATH"]))
    plants = f"""
import os, pathlib
for folder in ({str(tools)!r}, {str(hermetic / "none")!r}, {str(hermetic / "own")!r}):
    for name in ("git", "ruff", "rm"):
        try:
            os.makedirs(folder, exist_ok=True)
            pathlib.Path(folder, name).write_text("#!/bin/sh\\ntouch {mark}\\nexit 1\\n")
            os.chmod(pathlib.Path(folder, name), 0o755)
        except OSError:
            pass
open("new.py", "w").write("x = 1\\n")
"""
    words = ("issue-to-pr", "issue.md", "--sandbox", "require", "--json", "--gate", "ruff check .")
    result = repo.run(*words, agent=agent(plants), env={"PATH": path})
    assert result.status == 0 and not mark.exists(), result.err
    assert (hermetic / "own/git").exists() and not (tools / "git").exists()


@needs_bwrap
@pytest.mark.parametrize("place", ["app/../.ignore", "home/.config/ruff/.ruff.toml"])
def test_settings_planted_outside_do_not_steer_the_gate(
    repo: Repository, agent: Any, tmp_path: Path, place: str
) -> None:
    text = "*.py\n" if "ignore" in place else 'lint.ignore = ["ALL"]\n'
    plants = f"import os\nos.makedirs({str((tmp_path / place).parent)!r}, exist_ok=True)\n"
    plants += f"open('new.py', 'w').write('import os\\n')\nopen({str(tmp_path / place)!r}, 'w')"
    words = ("issue-to-pr", "issue.md", "--sandbox", "require", "--json", "--gate", "ruff check .")
    result = repo.run(*words, agent=agent(f"{plants}.write({text!r})"))
    assert "ruff: RED" in result.err and result.report["branch"] is None
    (tmp_path / place).unlink()
    notes = (
        f"open({str(tmp_path / 'home/.agent.json')!r}, 'w')\nopen('new.py', 'w').write('x = 1\\n')"
    )
    assert repo.run(*words, agent=agent(notes)).status == 0


@needs_bwrap
def test_file_that_a_gate_command_names_is_out_of_reach(
    repo: Repository, agent: Any, hermetic: Path
) -> None:
    rules = hermetic / "ci/ruff.toml"
    rules.parent.mkdir()
    rules.write_text("")
    softens = f"""
import os
open("new.py", "w").write("import os\\n")
for do in (lambda: open({str(rules)!r}, "w").write("lint.ignore = ['ALL']"),
           lambda: os.rename({str(rules.parent)!r}, {str(hermetic / "away")!r})):
    try: do()
    except OSError: pass
"""
    gate = ("--gate", f"ruff check --no-cache --config {rules} .")
    result = repo.run("issue-to-pr", "issue.md", *gate, agent=agent(softens))
    assert result.status == 1 and rules.read_text() == "", result.out
    assert repo.run("issue-to-pr", "issue.md", *gate, agent=agent("open('a.py', 'w')")).status == 0
