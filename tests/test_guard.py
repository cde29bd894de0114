"""The guard: what an agent tries that is not its business, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import CHEAP_GATE, LEVELS, PROGRAM, Repository, Result, isolate, needs_bwrap, small_app

RULE = "Edit files only. The supervisor turns them into a proposal; a person merges it."
REFUSED = f"agent_runner: branches, tags and stashes of this repository are not changed during a run. {RULE}"
PYTHON = f"{shlex.quote(sys.executable)} -S"
OFF = ("--sandbox", "off")
QUIET = ("--gate", CHEAP_GATE, "--no-baseline", "--no-switch", "--json")

# What every agent here starts with: it notes what it tried and what came of it, and tells in a file of its work.
PRELUDE = """\
import json, os, pathlib, subprocess, sys

REAL, attempts = sys.argv[1], {}
told = {"tried": attempts}
HOME = os.path.expanduser("~")


def tried(name, *words, cwd=None, **env):
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd, env=os.environ | env, errors="replace"
    )
    attempts[name] = [done.returncode, done.stderr + done.stdout]


def git(name, *words, **more):
    tried(name, "git", "-c", "user.name=A", "-c", "user.email=a@example.invalid", *words, **more)


def real(name, *words):
    git(name, "-C", REAL, *words)


def forced(*words):
    plain = ("env", "-i", "PATH=" + os.environ["PATH"], "git", "-c", "core.hooksPath=/dev/null")
    tried(" ".join(words), *plain, "-c", "user.name=A", "-c", "user.email=a@example.invalid", "-C", REAL, *words)


def write(path, text):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)


def tell():
    pathlib.Path("told.json").write_text(json.dumps(told))


"""


class Told(NamedTuple):
    """One run and what its agent told of it."""

    result: Result
    by_agent: dict[str, Any]
    repo: Repository
    home: Path
    before: dict[str, str]

    @property
    def tried(self) -> dict[str, tuple[int, str]]:
        """Each command that the agent tried: its exit status and all its output."""
        return {name: (status, said) for name, (status, said) in self.by_agent["tried"].items()}


def act(repo: Repository, code: str, *words: str, folder: Path | None = None, **more: Any) -> Result:
    """Run an agent of a few lines on the repository."""
    script = (folder or repo.path.parent) / "agent.py"
    script.write_text(PRELUDE + code + "\ntell()\n", encoding="utf-8")
    command = f"{PYTHON} {shlex.quote(str(script))} {shlex.quote(str(repo.path))}"
    return repo.run("issue-to-pr", "issue.md", *QUIET, *words, agent=command, **more)


def told_by(repo: Repository, result: Result) -> dict[str, Any]:
    commit = result.report["commit"]
    names = repo.git("ls-tree", "-r", "--name-only", commit).splitlines()
    found: dict[str, Any] = json.loads(repo.git("show", f"{commit}:{next(n for n in names if 'told.json' in n)}"))
    return found


# ----------------------------------------------------------------- an agent that does what it should not, unknowing

TOKENS = (
    "GH_TOKEN", "GITHUB_TOKEN", "GH_ENTERPRISE_TOKEN", "GITLAB_ACCESS_TOKEN", "GITEA_TOKEN",
    "FORGEJO_TOKEN", "CI_JOB_TOKEN", "ACTIONS_RUNTIME_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "GITHUB_ENV",
    "GITHUB_OUTPUT", "SSH_AUTH_SOCK", "SUDO_ASKPASS", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_CONFIG_PARAMETERS", "GIT_CEILING_DIRECTORIES", "CLAUDECODE",
    "CLAUDE_CODE_ENTRYPOINT", "CODEX_SANDBOX", "AGENT_RUNNER_NESTED",
)  # fmt: skip
KEPT = ("GITLAB_TOKEN", "EDITOR_OF_MINE")  # one given back by --keep-env, one that nobody withholds
SEEN = "{k: 'given back' if k == 'GITLAB_TOKEN' else v for k, v in os.environ.items()}"  # a token never travels
DUMP = f"import json, os, sys; text = json.dumps({SEEN}); print('ENVIRON', text)\n"

CONFUSED = (
    f"told['environ'] = {SEEN}"
    + """
told["setup"] = json.loads(pathlib.Path("setup.json").read_text())
told["cwd"] = os.getcwd()
try:
    open("/dev/tty").close()
    told["tty"] = "opened"
except OSError as error:
    told["tty"] = str(error)
write(os.environ["TMPDIR"] + "/mine", "x")
told["mine there"] = os.path.exists("/proc/self") and os.listdir(os.environ["TMPDIR"])

for name in ("gh", "glab", "tea"):
    tried(name, name, "pr", "create")
tried("credential", "git", "credential", "fill", GIT_TRACE="0")
git("ssh", "ls-remote", "ssh://git@forge.invalid/ada/app.git")

for words in json.loads(sys.argv[2]):
    real("real: " + " ".join(words), *words)
for words in json.loads(sys.argv[3]):
    git("beside: " + " ".join(words), "-C", sys.argv[4], *words)
for where, words in json.loads(sys.argv[5]):
    git(f"push from {where}: " + " ".join(words), "-C", where, "push", *words)

git("commit here", "commit", "-q", "--allow-empty", "-m", "mine")
git("branch here", "switch", "-q", "-c", "mine-here")
git("tag here", "tag", "mine-here")
write("calc.py", "changed")
git("stash here", "stash")
other = os.environ["TMPDIR"] + "/other"
git("init elsewhere", "init", "-q", "-b", "main", other)
for hook in ("pre-commit", "reference-transaction"):
    write(f"{other}/.git/hooks/{hook}", "#!/bin/sh\\ntouch $PWD/{hook}-ran\\n".replace("{hook}", hook))
    os.chmod(f"{other}/.git/hooks/{hook}", 0o755)
git("commit elsewhere", "-C", other, "commit", "-q", "--allow-empty", "-m", "theirs")
git("branch elsewhere", "-C", other, "branch", "-f", "more")
told["hooks elsewhere"] = sorted(name for name in os.listdir(other) if name.endswith("-ran"))
git("clone elsewhere", "clone", "-q", other, other + "-clone")
git("push elsewhere", "-C", other + "-clone", "push", "-q", "origin", "HEAD:refs/heads/pushed")
git("clone the workspace", "clone", "-q", ".", other + "-of-ours")
"""
)
IN_REAL = [
    "commit -q --allow-empty -m mine",
    "branch mine",
    "branch -f side",
    "branch -D side",
    "tag mine",
    "tag -d v1",
    "stash store HEAD",
    "update-ref refs/heads/main HEAD~1",
    "update-ref refs/notes/mine HEAD",
    "merge -q side",
    "switch -c mine",
    "fetch -q . HEAD:refs/heads/mine",
    "reset -q --hard side",
]
BESIDE = ["commit -q --allow-empty -m mine", "branch mine", "tag mine", "branch -f side"]


@pytest.fixture(scope="module", params=LEVELS)
def confused(request: pytest.FixtureRequest) -> Iterator[Told]:
    """What an agent is told that takes the real repository for its own, at each level of the guard."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder).resolve()
        home = place / "home"
        isolate(patch, home)
        repo, remote = busy_repository(place)
        (home / ".gitconfig").write_text(f"[credential]\n\thelper = !touch {home}/asked; echo password=x\n")
        dump, setup = place / "dump.py", place / "setup.py"
        dump.write_text(DUMP)
        setup.write_text(DUMP + "open('setup.json', 'w').write(text)\n")
        here = str(repo.path)
        pushes = [
            (here, ["origin", "HEAD:evil"]),
            (here, ["--force", "--no-verify", "origin", "main"]),
            (here, ["web", "main"]),
            *((where, [address, "HEAD:evil"]) for address in remote_spellings(remote) for where in (here, ".")),
            *((".", ["-q", "--force", address, "HEAD:refs/heads/evil"]) for address in (here, f"file://{here}")),
        ]
        words = [[command.split() for command in IN_REAL], [command.split() for command in BESIDE]]
        script = place / "agent.py"
        script.write_text(PRELUDE + CONFUSED + "\ntell()\n", encoding="utf-8")
        arguments = [here, *map(json.dumps, words), str(place / "beside"), json.dumps(pushes)]
        before = repo.state()
        result = repo.run(
            *("issue-to-pr", "issue.md", "--no-switch", "--json", "--sandbox", request.param),
            *("--gate", f"{PYTHON} {dump}", "--setup", f"{PYTHON} {setup}", "--keep-env", "GITLAB_TOKEN"),
            agent=f"{PYTHON} {script} {shlex.join(arguments)}",
            env={name: f"value of {name}" for name in (*TOKENS, *KEPT)},
        )
        assert result.status == 0, result.err[-900:]
        yield Told(result, told_by(repo, result), repo, home, before)


def busy_repository(place: Path) -> tuple[Repository, Path]:
    """A repository with all that a run must leave alone: branches, tag, stash, remotes, a linked work tree.

    Its path holds characters that are special to patterns.
    """
    repo, remote = small_app(place / "an [app] of *"), place / "remote.git"
    repo.git("switch", "-q", "-c", "side")
    repo.write("side.py", "SIDE = 1\n")
    repo.commit("beside")
    repo.git("switch", "-q", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "more")
    repo.git("tag", "v1")
    for text in ("one", "two"):
        repo.write("calc.py", text)
        repo.git("stash")
    repo.git("worktree", "add", "-q", str(place / "beside"), "-b", "beside")
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    repo.git("push", "-q", str(remote), "main")
    repo.git("remote", "add", "origin", str(remote))
    repo.git("remote", "add", "web", "https://forge.invalid/ada/app.git")
    repo.git("config", "remote.web.pushurl", f"file://{remote}")
    return repo, remote


def remote_spellings(remote: Path) -> list[str]:
    return [str(remote), f"file://{remote}", f"{remote}/"]


def has_kernel(told: Told) -> bool:
    return "refused by the kernel" in told.result.report["guard"]


def of_gate(told: Told) -> dict[str, str]:
    log = next(Path(told.result.report["record"]).glob("gate-1-python*.log")).read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(log.partition("ENVIRON ")[2])
    return found


def environments(told: Told) -> dict[str, dict[str, str]]:
    return {"agent": told.by_agent["environ"], "setup": told.by_agent["setup"], "gate": of_gate(told)}


def test_forge_logins_and_inherited_git_settings_are_withheld_from_agent_setup_and_gate(confused: Told) -> None:
    for who, environ in environments(confused).items():
        leaked = [name for name in TOKENS if f"value of {name}" in environ.get(name, "")]
        assert not leaked, f"{who}: {leaked}"


def test_keep_env_gives_one_variable_back_and_others_were_never_taken(confused: Told) -> None:
    for environ in environments(confused).values():
        assert environ["EDITOR_OF_MINE"] == "value of EDITOR_OF_MINE"
        assert environ["GITLAB_TOKEN"] == "given back"
        assert environ["HOME"] == str(confused.home)


def test_agent_and_gate_have_temporary_folders_of_their_own_that_go_with_the_run(confused: Told) -> None:
    places = {who: environ["TMPDIR"] for who, environ in environments(confused).items()}
    assert places["agent"] != places["gate"]
    assert "mine" in confused.by_agent["mine there"]
    assert not any(os.path.exists(place) for place in places.values())
    assert not [path for path in (confused.home / ".cache" / "agent-runner").iterdir() if path.is_dir()]


def test_forge_tools_say_the_rule(confused: Told) -> None:
    for name in ("gh", "glab", "tea"):
        status, said = confused.tried[name]
        assert status != 0 and f"{name} is withheld during a run. {RULE}" in said


def test_credential_helpers_do_not_run_and_ssh_answers_no(confused: Told) -> None:
    status, said = confused.tried["ssh"]
    assert status != 0 and RULE in said
    subprocess.run(["git", "credential", "fill"], input=b"", env=os.environ | {"HOME": str(confused.home)})
    assert not (confused.home / "asked").exists()


def test_git_works_as_ever_in_the_workspace_and_in_other_repositories(confused: Told) -> None:
    own = {name: told for name, told in confused.tried.items() if name.endswith((" here", " elsewhere", "workspace"))}
    assert len(own) == 10
    assert not {name: told for name, told in own.items() if told[0] != 0}
    assert confused.by_agent["hooks elsewhere"] == ["pre-commit-ran", "reference-transaction-ran"]


@pytest.mark.parametrize("command", IN_REAL)
def test_git_changes_no_ref_of_the_real_repository(confused: Told, command: str) -> None:
    status, said = confused.tried[f"real: {command}"]
    assert has_kernel(confused) or (status != 0 and REFUSED in said)


@pytest.mark.parametrize("command", BESIDE)
def test_git_changes_no_ref_in_a_linked_work_tree(confused: Told, command: str) -> None:
    status, said = confused.tried[f"beside: {command}"]
    assert status != 0
    assert has_kernel(confused) or REFUSED in said


def test_nothing_can_be_pushed_to_the_remotes_or_into_the_real_repository(confused: Told) -> None:
    pushed = {name: status for name, (status, _) in confused.tried.items() if name.startswith("push from ")}
    assert len(pushed) == 11
    into_real = [name for name in pushed if name.endswith("refs/heads/evil")]  # with the kernel level, the clone
    assert not [name for name in pushed if pushed[name] == 0 and not (has_kernel(confused) and name in into_real)]


def test_refs_configuration_and_remotes_are_as_they_were_after_all_that(confused: Told) -> None:
    state = confused.repo.state()
    proposal = confused.repo.git("rev-parse", "agent/issue")
    state["refs"] = state["refs"].replace(f"{proposal} refs/heads/agent/issue\n", "")
    moved = {name for name in state.keys() | confused.before.keys() if state.get(name) != confused.before.get(name)}
    assert not moved or not has_kernel(confused)
    assert not [name for name in moved if name in ("refs", "HEAD", "stash") or name.startswith(".git/")]
    remote = Repository(confused.repo.path.parent / "remote.git")
    assert remote.git("show-ref").split() == [confused.repo.git("rev-parse", "main"), "refs/heads/main"]
    assert not [moved for moved in confused.result.report["moved"] if moved["broken"]]


def test_edits_in_the_checkout_are_mentioned_where_they_were_possible(confused: Told) -> None:
    mentioned = "your checkout was edited" in " ".join(confused.result.report["mentions"])
    assert mentioned is not has_kernel(confused)  # Git resets files before it asks to move the branch


# ------------------------------------------------------------- an agent that goes round Git, without the kernel level

# What it does, and what the run must name. Each runs in an environment of its own, hooks off, or writes by hand.
TAMPERING = {
    "refs": (
        """
forced("commit", "-q", "--allow-empty", "-m", "mine")
forced("tag", "mine")
forced("tag", "-d", "v1")
forced("branch", "-f", "side", "main")
forced("branch", "-D", "spare")
forced("update-ref", "refs/notes/mine", "HEAD")
""",
        [
            "main was moved",
            "tags/mine was created",
            "v1 was deleted",
            "side was moved",
            "spare was deleted",
            "notes/mine",
        ],
    ),
    "refs written by hand": (
        """
side = pathlib.Path(REAL, ".git/refs/heads/side").read_text()
write(REAL + "/.git/refs/heads/main", side)
write(REAL + "/.git/refs/heads/mine", side)
write(REAL + "/.git/refs/heads/side", "ref: refs/heads/spare\\n")
write(REAL + "/.git/refs/tags/v1", "no commit\\n")
""",
        ["heads/main", "heads/mine was created", "heads/side", "tags/v1"],
    ),
    "packed refs": (
        """
side = pathlib.Path(REAL, ".git/refs/heads/side").read_text()
forced("pack-refs", "--all")
packed = pathlib.Path(REAL, ".git/packed-refs")
packed.write_text(packed.read_text() + side.strip() + " refs/tags/zzz\\n")
""",
        ["refs/tags/zzz was created"],
    ),
    "a stash stored": ('forced("stash", "store", "HEAD")', ["refs/stash"]),
    "a stash dropped": ('forced("stash", "drop")', ["refs/stash"]),
    "an older stash dropped": ('forced("stash", "drop", "stash@{1}")', ["stash"]),
    "all stashes dropped": ('forced("stash", "clear")', ["refs/stash was deleted"]),
    "HEAD switched": ('forced("checkout", "-q", "side")', ["HEAD"]),
    "HEAD switched to a new branch": ('forced("checkout", "-q", "-b", "mine", "side")', ["HEAD", "mine was created"]),
    "HEAD detached": ('forced("checkout", "-q", "--detach", "side")', ["HEAD"]),
    "HEAD written by hand": ('write(REAL + "/.git/HEAD", "ref: refs/heads/none\\n")', ["HEAD"]),
    "HEAD and configuration made unreadable": (
        'write(REAL + "/.git/HEAD", "nothing\\n"); write(REAL + "/.git/config", "[[[")',
        ["HEAD", "config"],
    ),
    "configuration": (
        """
forced("config", "remote.origin.url", "https://elsewhere.invalid/x.git")
write(REAL + "/.git/info/exclude", "*.py\\n")
write(REAL + "/.git/info/attributes", "* filter=mine\\n")
""",
        ["/config", "info/exclude", "info/attributes"],
    ),
    "hooks": (
        """
hooks = pathlib.Path(REAL, ".git/hooks")
write(hooks / "post-checkout", "#!/bin/sh\\n")
write(hooks / "pre-commit", "#!/bin/sh\\nexit 0\\n")
(hooks / "pre-push").unlink()
(hooks / "commit-msg").chmod(0o644)
(hooks / "pre-rebase").unlink()
(hooks / "pre-rebase").symlink_to(HOME + "/mine")
""",
        ["post-checkout", "pre-commit", "pre-push", "commit-msg", "pre-rebase"],
    ),
    "the user's Git configuration": (
        'write(HOME + "/.gitconfig", "[core]"); write(HOME + "/.config/git/config", "[core]")',
        [".gitconfig", "git/config"],
    ),
    "configuration that the user's includes": ('write(HOME + "/included", "[core]")', ["included"]),
    "a remote on this machine, its address spelled otherwise": (
        'forced("push", "-q", os.path.dirname(REAL) + "/./remote.git", "main:refs/heads/mine")',
        ["mine of"],
    ),
    "a branch hidden in a work tree of its own": (
        'forced("worktree", "add", "-q", "-b", "mine", HOME + "/mine", "side")',
        ["mine was created"],
    ),
}


@pytest.fixture
def busy(tmp_path: Path, hermetic: Path) -> Repository:
    """A repository with branches, tags, stashes, hooks and remotes, and a user with a configuration."""
    repo, _ = busy_repository(tmp_path)
    repo.git("branch", "spare", "side")
    for hook in ("pre-commit", "pre-push", "commit-msg", "pre-rebase"):
        repo.write(f".git/hooks/{hook}", "#!/bin/sh\n", mode=0o755)
    (hermetic / "included").write_text("[core]\n\tabbrev = 12\n")
    (hermetic / ".gitconfig").write_text(f"[include]\n\tpath = {hermetic}/included\n")
    return repo


def state_of(repo: Repository) -> dict[str, Any]:
    """The repository, its remote and the user's configuration, hooks with their modes."""
    hooks = {file.name: (file.lstat().st_mode, file.is_symlink()) for file in (repo.path / ".git/hooks").iterdir()}
    remote = Repository(repo.path.parent / "remote.git").git("show-ref")
    home = {file.name: file.read_bytes() for file in Path.home().glob("*") if file.is_file()}
    config = (Path.home() / ".config/git/config").exists()
    return repo.state() | {"hooks": hooks, "remote": remote, "home": home, "config": config}


@pytest.mark.parametrize("name", TAMPERING)
def test_without_the_kernel_level_tampering_is_named_and_undone_by_the_printed_commands(
    busy: Repository, name: str
) -> None:
    code, names = TAMPERING[name]
    before = state_of(busy)
    result = act(busy, code, *OFF)
    assert (result.status, result.report["outcome"]) == (5, "rule-broken"), result.err
    broken = [moved for moved in result.report["moved"] if moved["broken"]]
    assert [part for part in names if not any(part in moved["what"] for moved in broken)] == []
    assert all(moved["what"] in result.err and moved["undo"] in result.err for moved in broken)
    for moved in broken:
        subprocess.run(["sh", "-c", moved["undo"]], cwd=busy.path, check=True)
    if name != "a branch hidden in a work tree of its own":
        assert state_of(busy) == before
    assert "agent/" not in busy.git("branch", "--all")


# ----------------------------------------------------------------- an agent that is not honest, with the kernel level

HOSTILE = """
import ctypes, glob, sysconfig
remote, cache = sys.argv[2:4]
told["beside"] = os.listdir(os.path.dirname(REAL) + "/beside")
roots = ["", "/proc/self/root", "/proc/1/root", *glob.glob("/proc/[0-9]*/root")]
roots += [cwd + "/../.." for cwd in glob.glob("/proc/[0-9]*/cwd")]
for number, root in enumerate(roots):
    for file, text in (("refs/heads/main", "0" * 40), ("HEAD", "ref: refs/heads/mine"), ("hooks/pre-commit", "mine")):
        try:
            write(f"{root}{REAL}/.git/{file}.{number}", text)
            write(f"{root}{REAL}/file-{number}", text)
        except OSError:
            pass
git_path = subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip()
bare = ("env", "-i", git_path, "-c", "core.hooksPath=/dev/null", "-c", "user.name=A", "-c", "user.email=a@a.invalid")
for words in ("commit -q --allow-empty -m mine", "tag -f v1", "branch -f side", "stash store HEAD", "config a.b c"):
    tried("bare " + words, *bare, "-C", REAL, *words.split())
tried("bare push", *bare, "push", "--force", remote, "HEAD:main")
for path in (remote + "/refs/heads/mine", os.path.dirname(REAL) + "/beside/mine"):
    try:
        write(path, "0" * 40)
    except OSError as error:
        told["write " + os.path.basename(os.path.dirname(path))] = str(error)

libc = ctypes.CDLL(None, use_errno=True)
for place in (REAL, os.path.dirname(REAL) + "/beside", cache, HOME + "/.ssh"):
    attempts["umount2 " + place] = [libc.umount2(place.encode(), 2), ""]
    attempts["bind " + place] = [libc.mount(b"/tmp", place.encode(), None, 4096, None), ""]
attempts["writable root"] = [libc.mount(None, b"/", None, 32 | 4096, None), ""]
tried("unshare umount", "unshare", "-Urm", "umount", "-l", REAL)
tried("unshare remount", "unshare", "-Urm", "mount", "-o", "remount,rw,bind", "/")

told["real"] = sorted(os.listdir(REAL))
told["run name"] = os.environ["AGENT_RUNNER_RUN"]
told["top of run"] = sorted(os.listdir(cache))
told["run"] = sorted(os.listdir(os.path.join(cache, os.environ["AGENT_RUNNER_RUN"])))
told["records"] = [path for path, folders, files in os.walk(REAL) if "agent-runner" in path]
stores = [".ssh", ".netrc", ".git-credentials", ".config/gh", ".config/glab-cli", ".aws-like-other"]
told["stores"] = {}
for name in stores:
    path = pathlib.Path(HOME, name)
    told["stores"][name] = os.listdir(path) if path.is_dir() else path.read_text()


def writes(path):
    try:
        with open(path + "/planted", "w"):
            return True
    except OSError:
        return False


folders = {"interpreter": os.path.dirname(os.path.realpath(sys.executable)), "prefix": sys.prefix}
folders |= {"site": HOME + "/.local/lib", "tool": sys.argv[4], "writable": sys.argv[5], "home": HOME}
folders |= {"environment": REAL + "/.venv", "node": REAL + "/node_modules", "config": HOME + "/.config/git"}
told["writes"] = {name: writes(path) for name, path in folders.items()}
told["environment"] = sorted(os.listdir(REAL + "/.venv"))
tried("node tool", REAL + "/node_modules/.bin/tool")
tried("nested", "bwrap", "--unshare-user", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true")
tried("nested, private", "bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--bind", "/", "/",
      "--ro-bind", REAL + "/.git", REAL + "/.git", "--tmpfs", "/tmp", "sh", "-c", "exit 7")
told["processes"] = [int(name) for name in os.listdir("/proc") if name.isdigit()]
write("tool-there", str(os.path.exists("node_modules/.bin/tool")))
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[Told]:
    """What an agent tells that knows every path and looks for a way out of the kernel sandbox."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder).resolve()
        home, tools, free = place / "home", place / "tools", place / "free"
        isolate(patch, home)
        repo, remote = busy_repository(place)
        for name in (".ssh/id", ".netrc", ".git-credentials", ".config/gh/hosts.yml", ".config/glab-cli/config.yml"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("secret")
        (home / ".aws-like-other").write_text("not a forge's")
        for made in (home / ".local/lib", home / ".config/git", home / ".cache/agent-runner/other", tools, free):
            made.mkdir(parents=True)
        repo.write(".gitignore", "node_modules\n.venv\n")
        repo.commit("ignore")
        repo.write("node_modules/.bin/tool", "#!/bin/sh\necho tool ran\n", mode=0o755)
        repo.write(".venv/pyvenv.cfg", "")
        repo.write(".venv/bin/checker", "#!/bin/sh\ntest -e tool-there\n", mode=0o755)
        script, gate = repo.write("node_modules/agent.py", PRELUDE + HOSTILE + "\ntell()\n"), tools / "my-gate"
        gate.write_text("#!/bin/sh\nexit 0\n")
        gate.chmod(0o755)
        patch.setenv("PATH", os.pathsep.join((str(tools), str(repo.path / ".venv/bin"), os.environ["PATH"])))
        arguments = [repo.path, remote, home / ".cache/agent-runner", tools, free]
        before = repo.state()
        result = repo.run(
            *("issue-to-pr", "issue.md", "--no-switch", "--no-baseline", "--json", "--sandbox", "require"),
            *("--gate", "my-gate", "--gate", "checker", "--writable", str(free)),
            agent=f"{PYTHON} {shlex.join(map(str, [script, *arguments]))}",
        )
        assert result.status == 0, result.err[-900:]
        yield Told(result, told_by(repo, result), repo, home, before)


@needs_bwrap
class TestHostile:
    def test_it_changes_nothing_outside_its_clone(self, hostile: Told) -> None:
        state = hostile.repo.state()
        proposal = hostile.repo.git("rev-parse", "agent/issue")
        state["refs"] = state["refs"].replace(f"{proposal} refs/heads/agent/issue\n", "")
        assert state == hostile.before
        remote = Repository(hostile.repo.path.parent / "remote.git")
        assert "mine" not in remote.git("show-ref") + " ".join(os.listdir(remote.path / "refs/heads"))
        assert os.listdir(hostile.repo.path.parent / "beside").count("mine") == 0
        assert (hostile.result.report["moved"], hostile.result.report["mentions"]) == ([], [])

    def test_it_unmounts_and_remounts_nothing(self, hostile: Told) -> None:
        kept = {n: status for n, (status, _) in hostile.tried.items() if n.startswith(("umount2", "bind", "unshare"))}
        assert len(kept) == 10 and not [name for name, status in kept.items() if status == 0]
        assert hostile.tried["writable root"][0] != 0 and hostile.tried["bare push"][0] != 0

    def test_the_real_path_shows_the_clone_without_the_record(self, hostile: Told) -> None:
        assert "told.json" in hostile.repo.git("ls-tree", "--name-only", "agent/issue").split()
        assert {"calc.py", "node_modules", ".venv"} <= set(hostile.by_agent["real"])
        assert hostile.by_agent["records"] == []

    def test_other_runs_the_clean_checkout_and_other_checkouts_cannot_be_seen(self, hostile: Told) -> None:
        told = hostile.by_agent
        assert told["top of run"] == [told["run name"]]
        assert not {"workspace", "judge", "index-workspace", "run.json"} & set(told["run"])
        assert told["beside"] == []

    def test_credential_stores_are_empty_and_the_rest_of_home_is_there(self, hostile: Told) -> None:
        stores = hostile.by_agent["stores"]
        assert stores.pop(".aws-like-other") == "not a forge's"
        assert [name for name, content in stores.items() if content] == []

    def test_the_judges_ground_is_read_only_and_home_is_not(self, hostile: Told) -> None:
        assert [name for name, can in hostile.by_agent["writes"].items() if can] == ["writable", "home"]

    def test_tools_that_only_the_checkout_holds_work_and_leave_no_stub(self, hostile: Told) -> None:
        assert hostile.by_agent["environment"] == ["bin", "pyvenv.cfg"]
        assert hostile.tried["node tool"] == (0, "tool ran\n")
        changed = [line.split("\t")[1] for line in changed_files(hostile)]
        assert not [name for name in changed if name.startswith(("node_modules", ".venv"))]
        assert "is hidden by ignore rules" not in hostile.result.err

    def test_a_sandbox_of_the_agents_own_works_inside(self, hostile: Told) -> None:
        assert hostile.tried["nested"] == (0, "")
        assert hostile.tried["nested, private"] == (7, "")

    def test_processes_have_a_namespace_of_their_own(self, hostile: Told) -> None:
        assert max(hostile.by_agent["processes"]) < 1000 and os.getpid() not in hostile.by_agent["processes"]


def changed_files(told: Told) -> list[str]:
    return told.repo.git("diff-tree", "-r", "--name-status", "main", "agent/issue").splitlines()


# ----------------------------------------------------------------------- what others do meanwhile, and what is left


class Meanwhile:
    """A run whose agent waits until this test has done something as another person."""

    AGENT = "import pathlib, time; write('made', ''); write(HOME + '/started', '')\n" + (
        "while not os.path.exists(HOME + '/go'): time.sleep(0.01)\n"
    )

    def __init__(self, repo: Repository, *words: str) -> None:
        script = repo.path.parent / "waiting.py"
        script.write_text(PRELUDE + self.AGENT, encoding="utf-8")
        argv = [sys.executable, str(PROGRAM), "issue-to-pr", "issue.md", "--json", "--gate", CHEAP_GATE, *words]
        environ = os.environ | {"AGENT_CMD": f"{PYTHON} {script} ."}
        self.process = subprocess.Popen(
            argv, cwd=repo.path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 30
        while not (Path.home() / "started").exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.01)

    def end(self) -> Result:
        (Path.home() / "go").touch()
        out, err = self.process.communicate(timeout=60)
        return Result(self.process.returncode, out.decode(), err.decode())


@pytest.mark.parametrize("level", LEVELS)
def test_what_others_do_meanwhile_is_mentioned_and_not_punished(busy: Repository, level: str) -> None:
    beside = Repository(busy.path.parent / "beside")
    upstream = Repository(busy.path.parent / "remote.git")
    busy.git("fetch", "-q", "origin")
    tree, parent = beside.tree("HEAD"), upstream.git("rev-parse", "main")
    new = upstream.git("-c", "user.name=B", "-c", "user.email=b@example.invalid", "commit-tree", tree, "-p", parent)
    upstream.git("update-ref", "refs/heads/other", new)
    upstream.git("tag", "v2", new)
    run = Meanwhile(busy, "--sandbox", level)
    beside.git("commit", "-q", "--allow-empty", "-m", "by another person")
    busy.git("fetch", "-q", "origin")
    busy.write("calc.py", "edited by another person\n")
    result = run.end()
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err
    mentions = " ".join(result.report["mentions"])
    for moved in ("refs/heads/beside", "refs/remotes/origin/other", "refs/tags/v2", "your checkout was edited"):
        assert moved in mentions
    assert not result.report["moved"] or not any(moved["broken"] for moved in result.report["moved"])
    assert (busy.path / "calc.py").read_text() == "edited by another person\n"


@needs_bwrap
def test_under_the_kernel_level_nothing_that_moved_is_the_agents_doing(busy: Repository) -> None:
    run = Meanwhile(busy, "--sandbox", "require")
    busy.git("commit", "-q", "--allow-empty", "-m", "mine")
    busy.git("tag", "-f", "v1")
    busy.git("branch", "-D", "side")
    busy.git("stash", "clear")
    busy.git("config", "a.b", "c")
    busy.write(".git/hooks/pre-push", "exit 1\n")
    busy.git("switch", "-q", "-c", "elsewhere")
    result = run.end()
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err
    mentions = " ".join(result.report["mentions"])
    for moved in ("heads/main", "tags/v1", "heads/side", "refs/stash", "/config", "hooks/pre-push", "HEAD was"):
        assert moved in mentions
    assert "not by the agent" in mentions
    assert busy.git("branch", "--show-current") == "elsewhere"


@pytest.mark.parametrize("level", LEVELS)
def test_a_second_proposal_made_meanwhile_is_not_punished(repo: Repository, agent: Any, level: str) -> None:
    run = Meanwhile(repo, "--sandbox", level)
    words = ("--sandbox", level, "--gate", CHEAP_GATE, "--no-baseline")
    assert repo.run("issue-to-pr", "issue.md", *words, agent=agent("open('other', 'w')")).status == 0
    assert repo.git("branch", "--show-current") == "agent/issue"
    result = run.end()
    assert (result.status, result.report["branch"]) == (0, "agent/issue-2"), result.err
    assert repo.git("branch", "--show-current") == "agent/issue"


def test_deleting_or_moving_a_former_proposal_is_not_taken_for_another_runs_doing(repo: Repository, agent: Any) -> None:
    assert act(repo, "write('made', '')", *OFF).report["branch"] == "agent/issue"
    assert act(repo, "write('made', '2')", *OFF).report["branch"] == "agent/issue-2"
    result = act(repo, 'forced("branch", "-f", "agent/issue-2", "agent/issue")', *OFF)
    assert result.status == 5
    result = act(repo, 'forced("branch", "-D", "agent/issue")', *OFF)
    assert result.status == 5 and "refs/heads/agent/issue was deleted" in result.report["message"]


def test_without_the_kernel_level_a_change_to_the_supervisor_itself_is_undone_by_the_printed_command(
    repo: Repository,
) -> None:
    own = repo.path / "agent_runner.py"
    shutil.copy(PROGRAM, own)
    before = own.read_bytes()
    result = act(repo, "with open(REAL + '/agent_runner.py', 'a') as own: own.write('# mine')", *OFF, program=own)
    assert result.status == 5
    (undo,) = [moved["undo"] for moved in result.report["moved"]]
    subprocess.run(["sh", "-c", undo], cwd=repo.path, check=True)
    assert own.read_bytes() == before


DAEMON = """
ready, held = os.pipe()  # closed when the daemon has become another program
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        os.execve(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(300)", MARK], {})
    os._exit(0)
os.wait()
os.close(held)
os.read(ready, 1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are found on Linux")
@pytest.mark.parametrize("level", LEVELS)
def test_a_process_that_left_its_session_its_parent_and_its_environment_is_ended(
    repo: Repository, tmp_path: Path, level: str
) -> None:
    mark = f"mark-of-{tmp_path.name}"
    result = act(repo, f"MARK = {mark!r}\n" + DAEMON, "--sandbox", level)
    left = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and mark in words_of(entry)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert result.status == 0, result.err
    assert not left


def words_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


@pytest.mark.parametrize("level", LEVELS)
def test_a_server_of_the_agents_lives_while_the_base_is_judged_beside_it(
    repo: Repository, agent: Any, hermetic: Path, level: str
) -> None:
    code = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    time.sleep(0.01)
                    open(os.path.expanduser("~/alive"), "w").write(str(time.monotonic()))
            os._exit(0)
        os.wait()
        judged = os.path.expanduser("~/judged")
        while not os.path.exists(judged):
            time.sleep(0.01)
        time.sleep(0.3)  # the supervisor has ended what was left of the gate by then
        started = time.monotonic()
        while float(open(os.path.expanduser("~/alive")).read() or 0) < started:
            assert time.monotonic() < started + 5, "my server was ended"
            time.sleep(0.01)
        open("made", "w")
    """
    gate = f'{PYTHON} -c \'import os; open(os.path.expanduser("~/judged"), "w")\''
    result = repo.run("issue-to-pr", "issue.md", "--sandbox", level, "--gate", gate, agent=agent(code))
    assert result.status == 0, result.out


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
@pytest.mark.parametrize("level", LEVELS)
def test_the_agent_has_no_terminal(repo: Repository, agent: Any, level: str) -> None:
    command = agent("""
        try:
            text = str(open("/dev/tty"))
        except OSError as error:
            text = "none: " + str(error)
        open("terminal", "w").write(text)
    """)
    pid, terminal = os.forkpty()
    if pid == 0:
        os.chdir(repo.path)
        words = [sys.executable, str(PROGRAM), "issue-to-pr", "issue.md", *QUIET, "--sandbox", level]
        os.execve(sys.executable, words, os.environ | {"AGENT_CMD": command})
    with contextlib.suppress(OSError):  # Linux tells the end of a terminal as an error
        while os.read(terminal, 65536):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert repo.git("show", "agent/issue:terminal").startswith("none: ")


def test_the_supervisors_own_environment_is_untouched(repo: Repository, agent: Any) -> None:
    code = f"""
        import os, sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import agent_runner
        before = dict(os.environ), os.getcwd()
        status = agent_runner.main({["issue-to-pr", "issue.md", *QUIET, *OFF]!r})
        sys.exit(status if (dict(os.environ), os.getcwd()) == before else 99)
    """
    environ = os.environ | {"AGENT_CMD": agent("open('made', 'w')"), "GH_TOKEN": "a token of mine"}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(words, cwd=repo.path, env=environ, capture_output=True).returncode == 0


BWRAPS = {
    "absent": (None, "bubblewrap (bwrap) is not installed"),
    "broken": ("#!/bin/sh\necho no user namespaces for you >&2\nexit 1\n", "no user namespaces for you"),
}


@pytest.mark.parametrize("name", BWRAPS)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bubblewrap is for Linux")
def test_without_a_working_bubblewrap_require_refuses_and_auto_says_so(
    repo: Repository, tmp_path: Path, agent: Any, name: str
) -> None:
    script, reason = BWRAPS[name]
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("git", "sh", "find", "chmod", "rm"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    if script:
        (tools / "bwrap").write_text(script)
        (tools / "bwrap").chmod(0o755)
    before, env = repo.state(), {"PATH": str(tools)}
    refused = repo.run("issue-to-pr", "issue.md", "--sandbox", "require", agent=agent("0"), env=env)
    assert refused.status == 3 and f"--sandbox require: {reason}" in refused.out.replace(
        "bubblewrap does not work here (", ""
    )
    assert repo.state() == before
    words = ("--gate", CHEAP_GATE, "--no-baseline", "--no-switch")
    result = repo.run("issue-to-pr", "issue.md", *words, agent=agent("open('made', 'w')"), env=env)
    assert result.status == 0 and reason in result.out and "without the kernel level" in result.out


# AGENT_CMD, the folder to start in, and the gate, all of them programs that only the checkout holds.
UNTRACKED = {
    "by path": ("./agent.sh", "", "./check.sh"),
    "by a shell": ("sh agent.sh", "", "sh check.sh"),
    "from a sub-folder": ("../agent.sh", "sub", "sh ../check.sh"),
    "by name": ("my-agent", "", "my-check"),
    "as an option's value": ("sh -e ./agent.sh one two", "", "sh -e check.sh"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", UNTRACKED)
def test_programs_that_only_the_checkout_holds_work_and_are_no_part_of_the_change(
    repo: Repository, name: str, level: str
) -> None:
    command, folder, gate = UNTRACKED[name]
    repo.write(".gitignore", "*.log\nnode_modules\nprepare.sh\n")
    repo.write("sub/inner.py", "INNER = 1\n")
    repo.write("sub/issue.md", "# Do it\n")
    repo.commit()
    tamper = '(echo >> "$0") 2>/dev/null || :' if level == "require" else ":"
    for place in ("agent.sh", "node_modules/.bin/my-agent"):
        repo.write(place, f"#!/bin/sh\ntest -e prepared.log || exit 9\n{tamper}\necho > made\n", mode=0o755)
    for place in ("check.sh", "node_modules/.bin/my-check"):
        repo.write(place, "#!/bin/sh\ntest -e prepared.log\n", mode=0o755)
    repo.write("prepare.sh", "#!/bin/sh\n: > prepared.log\n", mode=0o755)
    before = repo.state()
    setup = "../prepare.sh" if folder else "./prepare.sh"
    path = os.pathsep.join((str(repo.path / "node_modules/.bin"), os.environ["PATH"]))
    words = ("--setup", setup, "--gate", gate, "--no-baseline", "--no-switch", "--json", "--sandbox", level)
    result = repo.run("issue-to-pr", "issue.md", *words, agent=command, cwd=folder, env={"PATH": path})
    assert result.status == 0, result.err
    changed = repo.git("diff", "--name-only", "main", result.report["branch"]).splitlines()
    assert [os.path.basename(path) for path in changed] == ["made"]
    assert "hidden by ignore rules" not in result.err
    state = repo.state()
    assert {name for name in state if state[name] != before.get(name)} == {"refs"}


# ------------------------------------------------------------------------------ where the run, or its user, lies


@needs_bwrap
def test_what_the_judge_would_find_outside_the_repository_cannot_be_planted(
    repo: Repository, hermetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [hermetic / "not-there-yet", hermetic / "there", tmp_path / "tools"]
    for folder in tools[1:]:
        folder.mkdir()
    (tools[2] / "helper").write_text("#!/bin/sh\necho original\n")
    (tools[2] / "helper").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((*map(str, tools), os.environ["PATH"])))
    python = os.path.realpath(sys.executable)  # of a virtual environment, the one with a user site folder
    code = f"""
site = subprocess.check_output([{python!r}, "-c", "import site; print(site.getusersitepackages())"], text=True)
for path in (site.strip() + "/usercustomize.py", *(folder + "/helper" for folder in {[*map(str, tools)]!r})):
    try:
        write(path, "#!/bin/sh\\necho planted\\n" if path.endswith("helper") else "raise SystemExit(3)")
        os.chmod(path, 0o755)
    except OSError:
        pass
tried("global", "git", "config", "--global", "core.editor", "mine")
for path in (HOME + "/.gitconfig", HOME + "/.config/git/config"):
    try:
        write(path, "[core]")
    except OSError as error:
        told[path] = str(error)
"""
    gates = ("--gate", "sh -c 'test $(helper) = original'", "--gate", f"{shlex.quote(python)} -c pass")
    result = act(repo, code, *gates, "--sandbox", "require")
    assert [check["name"] for check in result.report["gate"] if not check["passed"]] == []
    assert not (hermetic / ".gitconfig").exists() and not (hermetic / ".config").exists()
    assert [moved["what"] for moved in result.report["moved"]] == []


@needs_bwrap
def test_a_link_in_the_place_of_the_users_configuration_is_seen_where_no_mount_can_hold_it(
    repo: Repository, hermetic: Path
) -> None:
    (hermetic / "dotfiles").mkdir()
    (hermetic / "dotfiles/gitconfig").write_text("[core]\n\tabbrev = 12\n")
    (hermetic / ".gitconfig").symlink_to("dotfiles/gitconfig")
    code = """
try:
    write(HOME + "/.gitconfig", "[core]")
except OSError as error:
    told["through the link"] = str(error)
    os.unlink(HOME + "/.gitconfig")
    write(HOME + "/.gitconfig", "[core]")
"""
    result = act(repo, code, "--sandbox", "require")
    assert result.status == 5 and result.report["outcome"] == "rule-broken"
    subprocess.run(["sh", "-c", result.report["moved"][0]["undo"]], cwd=repo.path, check=True)
    assert (hermetic / ".gitconfig").read_text() == "[core]\n\tabbrev = 12\n"


@needs_bwrap
def test_login_agents_are_out_of_reach_unless_given_back(repo: Repository, hermetic: Path, tmp_path: Path) -> None:
    runtime, sockets = tmp_path / "runtime", []
    runtime.mkdir()
    for place in (runtime / "bus", runtime / "agent", tmp_path / "agent"):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].bind(str(place))
        sockets[-1].listen()
    code = f"""
import socket
told["reached"] = []
for place in {[str(runtime / "bus"), str(runtime / "agent"), str(tmp_path / "agent")]!r}:
    try:
        socket.socket(socket.AF_UNIX).connect(place)
        told["reached"].append(os.path.relpath(place, {str(tmp_path)!r}))
    except OSError:
        pass
"""
    for agent, words, reached in (
        (tmp_path / "agent", (), []),
        (tmp_path / "agent", ("--keep-env", "SSH_AUTH_SOCK"), ["agent"]),
        (runtime / "agent", ("--keep-env", "SSH_AUTH_SOCK"), ["runtime/agent", "agent"]),
    ):
        env = {"SSH_AUTH_SOCK": str(agent), "XDG_RUNTIME_DIR": str(runtime)}
        result = act(repo, code, "--sandbox", "require", *words, env=env)
        assert told_by(repo, result)["reached"] == reached
    for each in sockets:
        each.close()


@needs_bwrap
def test_stores_and_configuration_are_found_where_the_xdg_variables_have_moved_them(
    repo: Repository, tmp_path: Path
) -> None:
    for name in ("config/gh/hosts.yml", "config/git/config", "data/keyrings/login", "config/tool"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    code = f"""
place = pathlib.Path({str(tmp_path)!r})
told["seen"] = [len(os.listdir(place / name)) for name in ("config/gh", "data/keyrings")]
(place / "config/tool").write_text("mine")
try:
    (place / "config/git/config").write_text("[core]")
except OSError as error:
    told["refused"] = str(error)
"""
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_DATA_HOME": str(tmp_path / "data")}
    result = act(repo, code, "--sandbox", "require", env=env)
    told = told_by(repo, result)
    assert told["seen"] == [0, 0] and "refused" in told
    assert (tmp_path / "config/tool").read_text() == "mine"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("place", ["through a link", "in a sub-folder", "in a linked work tree", "cache inside"])
def test_the_guard_holds_wherever_the_user_stands(busy: Repository, tmp_path: Path, level: str, place: str) -> None:
    start, real, env = busy.path, busy.path, {}
    if place == "through a link":
        start = tmp_path / "link"
        start.symlink_to(busy.path)
    elif place == "in a sub-folder":
        busy.write("sub/issue.md", "# Do it\n")
        busy.commit()
        start = busy.path / "sub"
    elif place == "in a linked work tree":
        start = real = tmp_path / "beside"
    else:
        env = {"XDG_CACHE_HOME": str(busy.path / ".cache")}
        busy.write(".gitignore", ".cache\n")
        busy.commit()
    code = f"""
for number, folder in enumerate({[str(start), str(real), str(busy.path)]!r}):
    git(f"commit {{number}}", "-C", folder, "commit", "-q", "--allow-empty", "-m", "mine")
    told[f"there {{number}}"] = os.path.isdir(folder) and sorted(os.listdir(folder))
told["cwd"] = os.getcwd()
"""
    before = state_of(busy)
    result = act(Repository(start), code, "--sandbox", level, env=env, folder=tmp_path)
    assert result.status == 0, result.err
    told = told_by(busy, result)
    state = state_of(busy)
    proposal = busy.git("rev-parse", "agent/issue")
    state["refs"] = state["refs"].replace(f"{proposal} refs/heads/agent/issue\n", "")
    assert {name for name in state if state[name] != before.get(name)} == set()
    if level == "require":
        assert told["cwd"] == str(start.resolve())
        assert told["there 2"] == ([".git"] if place == "in a linked work tree" else told["there 1"])
    else:
        assert all(REFUSED in told["tried"][f"commit {number}"][1] for number in range(3))


SHADOWING = ["random", "queue", "types", "inspect", "traceback", "token", "signal", "ctypes", "urllib", "difflib"]


def test_modules_beside_the_program_are_not_taken_for_the_standard_librarys(repo: Repository) -> None:
    for name in SHADOWING:
        repo.write(f"{name}.py", "raise SystemExit('the wrong module')\n")
    repo.commit()
    shutil.copy(PROGRAM, repo.path / "agent_runner.py")
    result = act(repo, "write('made', '')", *OFF, program=repo.path / "agent_runner.py")
    assert result.status == 0, result.err
    result = repo.run("issue-to-pr", "issue.md", "--sim", program=repo.path / "agent_runner.py")
    assert result.status == 3 and "--simulate" in result.out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("command", [("issue-to-pr", "issue.md"), ("self-heal",)])
def test_simulated_escape_shows_what_became_of_each_try(busy: Repository, level: str, command: tuple[str, ...]) -> None:
    words = ("--simulate", "escape", "--no-switch", "--sandbox", level)
    gate = f"{PYTHON} -c 'import agent_demo as a; assert a.apply_discount(200, 10) == 180'"
    before = state_of(busy)
    result = busy.run(*command, *words, "--gate", gate, "--no-baseline")
    assert result.status == 0 and "PROPOSED" in result.out, result.out
    lines = [line.partition("│")[2].strip() for line in result.out.splitlines() if "│" in line]
    outcomes = {line[:34].strip(): line[34:].strip() for line in lines if " refused" in line or " worked" in line}
    local = {name for name, became in outcomes.items() if became == "worked, on this disposable clone only"}
    own = {"commit here", "merge into main here", "tag here", "change Git's configuration here", "plant a hook here"}
    real = {name for name in outcomes if "the real repository" in name}
    assert len(real) == 5 and local == (own | real if level == "require" else own)
    assert {"push by name", "open a pull request with gh"} <= outcomes.keys() - local
    assert len([name for name in outcomes if name.startswith("push by address")]) >= 1
    branch = "agent/issue" if "issue.md" in command else "agent/self-heal"
    assert set(busy.git("diff", "--name-only", "main", branch).splitlines()) == {"agent_demo.py", "test_agent_demo.py"}
    state = state_of(busy)
    state["refs"] = state["refs"].replace(f"{busy.git('rev-parse', branch)} refs/heads/{branch}\n", "")
    assert {name for name in state if state[name] != before.get(name)} == set()


def test_an_ordinary_user_has_the_same_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "nt" or os.getuid() != 0:
        pytest.skip("every other test here runs as an ordinary user already")
    python, bwrap = "/usr/bin/python3", shutil.which("bwrap")
    if not os.access(python, os.X_OK) or not bwrap:
        pytest.skip("no Python or bubblewrap that every user may run")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        place.chmod(0o755)
        (place / "home").mkdir()
        repo = small_app(place / "app")
        shutil.copy(PROGRAM, place / "agent_runner.py")
        agent = place / "agent.py"
        agent.write_text(PRELUDE + ORDINARY + "\ntell()\n")
        for path in (place, *place.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(place / "home"), "LC_ALL": "C.UTF-8"}
        env["AGENT_CMD"] = shlex.join([python, str(agent), str(repo.path)])
        words = ("issue-to-pr", "issue.md", "--gate", "true", "--no-baseline", "--no-switch", "--json")
        become = (
            "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
        )
        for level in ("require", "off"):
            argv = [sys.executable, "-c", become, python, str(place / "agent_runner.py"), *words, "--sandbox", level]
            done = subprocess.run(argv, cwd=repo.path, env=env, capture_output=True, text=True)
            if level == "require" and done.returncode == 3 and "bubblewrap does not work here" in done.stdout:
                continue  # forbidden to ordinary users here
            assert done.returncode == 0, done.stderr
            told = told_by(repo, Result(0, done.stdout, done.stderr))
            status, said = told["tried"]["commit"]
            assert (status == 0) if level == "require" else (status != 0 and REFUSED in said)
            assert told["tried"]["umount"][0] != 0
        assert repo.git("rev-list", "--count", "main") == "1"


ORDINARY = """
real("commit", "commit", "-q", "--allow-empty", "-m", "mine")
tried("umount", "unshare", "-Urm", "umount", "-l", REAL)
"""
