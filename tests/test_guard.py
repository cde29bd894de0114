"""The guard: what an agent tries that is not its business, and what becomes of it."""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import (
    CHEAP_GATE,
    LEVELS,
    PROGRAM,
    Repository,
    Result,
    World,
    isolate,
    needs_bwrap,
    side_by_side,
    small_app,
)  # fmt: skip

RULE = "Edit files only. The supervisor turns them into a proposal; a person merges it."
REFUSED = f"agent_runner: branches, tags and stashes of this repository are not changed during a run. {RULE}"
PYTHON = f"{shlex.quote(sys.executable)} -S"
OFF, REQUIRE = ("--sandbox", "off"), ("--sandbox", "require")
QUIET = ("--gate", CHEAP_GATE, "--no-baseline", "--no-switch", "--json")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has this")

# What every agent here starts with: it notes what it tried and what came of it, and tells in a file of its work.
PRELUDE = """\
import json, os, pathlib, subprocess, sys

attempts = {}
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
    before: dict[str, Any]

    @property
    def tried(self) -> dict[str, tuple[int, str]]:
        """Each command that the agent tried: its exit status and all its output."""
        return {name: (status, said) for name, (status, said) in self.by_agent["tried"].items()}


def home_of(repo: Repository) -> Path:
    """The home folder of the user whose repository this is."""
    home = repo.path.parent / "home"
    home.mkdir(exist_ok=True)
    return home


def text_of(repo: Repository, code: str) -> str:
    """An agent's text. It holds the real path itself: a word of its command would be made the clone's."""
    return f"REAL = {str(repo.path)!r}\n{PRELUDE}{code}\ntell()\n"


def run(repo: Repository, code: str, *words: str, arguments: tuple[object, ...] = (), **more: Any) -> Result:
    """Run an agent of a few lines, with a home folder of its own."""
    script = more.pop("place", repo.path.parent) / "agent.py"
    script.write_text(text_of(repo, code), encoding="utf-8")
    command = f"{PYTHON} {shlex.join(map(str, (script, *arguments)))}"
    more["env"] = {"HOME": str(script.parent / "home")} | more.get("env", {})
    (script.parent / "home").mkdir(exist_ok=True)
    return repo.run("issue-to-pr", "issue.md", *words, agent=command, **more)


def act(repo: Repository, code: str, *words: str, **more: Any) -> Result:
    return run(repo, code, *QUIET, *words, **more)


def told_by(repo: Repository, result: Result) -> dict[str, Any]:
    assert result.status == 0, result.err[-1500:]
    commit = result.report["commit"]
    names = repo.git("ls-tree", "-r", "--name-only", commit).splitlines()
    found: dict[str, Any] = json.loads(repo.git("show", f"{commit}:{next(n for n in names if 'told.json' in n)}"))
    return found


def busy_repository(place: Path) -> Repository:
    """A repository with all that a run must leave alone, and a user with a configuration.

    Branches, a tag, stashes, hooks, remotes, a linked work tree; its path is special to patterns.
    """
    repo, remote = small_app(place / "an [app] of *"), place / "remote.git"
    repo.git("switch", "-q", "-c", "side")
    repo.write("side.py", "SIDE = 1\n")
    repo.commit("beside")
    repo.git("switch", "-q", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "more")
    repo.git("tag", "v1")
    repo.git("branch", "spare", "side")
    for text in ("one", "two"):
        repo.write("calc.py", text)
        repo.git("stash")
    repo.git("worktree", "add", "-q", str(place / "beside"), "-b", "beside")
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    repo.git("push", "-q", str(remote), "main")
    repo.git("remote", "add", "origin", str(remote))
    repo.git("remote", "add", "web", "https://forge.invalid/ada/app.git")
    repo.git("config", "remote.web.pushurl", f"file://{remote}")
    for hook in ("pre-commit", "pre-push", "commit-msg", "pre-rebase"):
        repo.write(f".git/hooks/{hook}", "#!/bin/sh\n", mode=0o755)
    home = home_of(repo)
    (home / "included").write_text(f"[credential]\n\thelper = !touch {home}/asked; echo password=x\n")
    (home / ".gitconfig").write_text(f"[include]\n\tpath = {home}/included\n")
    return repo


def state_of(repo: Repository) -> dict[str, Any]:
    """All that must be as it was: the repository, its hooks' modes, its remote, the user's configuration."""
    hooks = {file.name: (file.lstat().st_mode, file.is_symlink()) for file in (repo.path / ".git/hooks").iterdir()}
    remote = Repository(repo.path.parent / "remote.git").git("show-ref")
    home = {file.name: file.read_bytes() for file in home_of(repo).glob("*") if file.is_file()}
    config = (home_of(repo) / ".config/git/config").exists()
    return repo.state() | {"hooks": hooks, "remote": remote, "home": home, "config": config}


def changed_state(repo: Repository, before: dict[str, Any], branch: str = "agent/issue") -> set[str]:
    """The names of what is not as it was, the proposal aside."""
    state = state_of(repo)
    proposal = f"{repo.git('rev-parse', branch)} refs/heads/{branch}\n"
    assert proposal in state["refs"]
    state["refs"] = state["refs"].replace(proposal, "")
    return {name for name in state.keys() | before.keys() if state.get(name) != before.get(name)}


# --------------------------------------------------------------------------------- agents that are told a lot at once


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """The runs whose agents try everything at once, two at a time."""
    place = tmp_path_factory.mktemp("long")
    levels = ["off"] if needs_bwrap.args[0] else ["off", "require"]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        isolate(patch, place / "home")
        small_app(place / "app")
        found = {level: pool.submit(confuse, place / level, level) for level in levels}
        if "require" in levels:
            found["hostile"] = pool.submit(attack, place / "hostile")
        return {name: future.result() for name, future in found.items()}


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
tried("credential", "sh", "-c", "printf 'protocol=https\\nhost=forge.invalid\\n\\n' | git credential fill")
git("ssh", "ls-remote", "ssh://git@forge.invalid/ada/app.git")

for words in json.loads(sys.argv[1]):
    real("real: " + " ".join(words), *words)
for words in json.loads(sys.argv[2]):
    git("beside: " + " ".join(words), "-C", sys.argv[3], *words)
for where, words in json.loads(sys.argv[4]):
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


def confuse(place: Path, level: str) -> Told:
    """A run of an agent that takes the real repository for its own."""
    place.mkdir()
    repo, remote = busy_repository(place), place / "remote.git"
    dump, setup, here = place / "dump.py", place / "setup.py", str(repo.path)
    dump.write_text(DUMP)
    setup.write_text(DUMP + "open('setup.json', 'w').write(text)\n")
    spellings = [str(remote), f"file://{remote}", f"{remote}/"]
    pushes = [
        (here, ["origin", "HEAD:evil"]),
        (here, ["--force", "--no-verify", "origin", "main"]),
        (here, ["web", "main"]),
        *((where, [address, "HEAD:evil"]) for address in spellings for where in (here, ".")),
        *((".", ["-q", "--force", address, "HEAD:refs/heads/evil"]) for address in (here, f"file://{here}")),
    ]
    words = [[command.split() for command in commands] for commands in (IN_REAL, BESIDE)]
    before = state_of(repo)
    result = run(
        repo, CONFUSED, "--no-switch", "--json", "--sandbox", level, "--keep-env", "GITLAB_TOKEN",
        "--gate", f"{PYTHON} {dump}", "--setup", f"{PYTHON} {setup}",
        arguments=(*map(json.dumps, words), place / "beside", json.dumps(pushes)),
        env={name: f"value of {name}" for name in (*TOKENS, *KEPT)},
    )  # fmt: skip
    return Told(result, told_by(repo, result), repo, before)


@pytest.fixture(params=LEVELS)
def confused(long_runs: dict[str, Told], request: pytest.FixtureRequest) -> Told:
    return long_runs[request.param]


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
        assert environ["HOME"] == str(home_of(confused.repo))


def test_agent_and_gate_have_temporary_folders_of_their_own_that_go_with_the_run(confused: Told) -> None:
    places = {who: environ["TMPDIR"] for who, environ in environments(confused).items()}
    assert places["agent"] != places["gate"]
    assert "mine" in confused.by_agent["mine there"]
    assert not any(os.path.exists(place) for place in places.values())
    assert not [path for path in (home_of(confused.repo) / ".cache/agent-runner").iterdir() if path.is_dir()]


def test_forge_tools_say_the_rule(confused: Told) -> None:
    for name in ("gh", "glab", "tea"):
        status, said = confused.tried[name]
        assert status != 0 and f"{name} is withheld during a run. {RULE}" in said


def test_credential_helpers_do_not_run_and_ssh_answers_no(confused: Told) -> None:
    status, said = confused.tried["ssh"]
    assert status != 0 and RULE in said
    assert confused.tried["credential"][0] != 0 and not (home_of(confused.repo) / "asked").exists()


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
    moved = changed_state(confused.repo, confused.before)
    assert not moved or not has_kernel(confused)
    assert not [name for name in moved if name not in ("index", "side.py")]
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
forced("push", "-q", os.path.dirname(REAL) + "/./remote.git", "main:refs/heads/pushed")
""",
        "main was moved, tags/mine was created, v1 was deleted, side was moved, spare was deleted, notes/mine, "
        "refs/heads/pushed of",
    ),
    "refs by hand": (
        """
side = pathlib.Path(REAL, ".git/refs/heads/side").read_text()
forced("pack-refs", "--all")
with open(REAL + "/.git/packed-refs", "a") as packed:
    packed.write(side.strip() + " refs/tags/zzz\\n")
write(REAL + "/.git/refs/heads/main", side)
write(REAL + "/.git/refs/heads/mine", side)
write(REAL + "/.git/refs/heads/side", "ref: refs/heads/spare\\n")
write(REAL + "/.git/refs/tags/v1", "no commit\\n")
""",
        "refs/tags/zzz was created, heads/main was moved, heads/mine was created, heads/side was moved, tags/v1",
    ),
    "a stash stored": ('forced("stash", "store", "HEAD")', "refs/stash was moved"),
    "an older stash dropped": ('forced("stash", "drop", "stash@{1}")', "logs/refs/stash was changed"),
    "all stashes dropped": ('forced("stash", "clear")', "refs/stash was deleted"),
    "HEAD switched": ('forced("checkout", "-q", "side")', "HEAD was ref: refs/heads/main"),
    "HEAD on a new branch": ('forced("checkout", "-q", "-b", "mine", "side")', "HEAD was, mine was created"),
    "HEAD detached": ('forced("checkout", "-q", "--detach", "side")', "HEAD was"),
    "HEAD by hand": ('write(REAL + "/.git/HEAD", "ref: refs/heads/none\\n")', "HEAD was"),
    "an unreadable repository": (
        'write(REAL + "/.git/HEAD", "nothing\\n"); write(REAL + "/.git/config", "[[[")',
        "HEAD was, .git/config was changed, the repository cannot be read",
    ),
    "configuration and hooks": (
        """
forced("config", "remote.origin.url", "https://elsewhere.invalid/x.git")
write(REAL + "/.git/info/attributes", "* filter=mine\\n")
hooks = pathlib.Path(REAL, ".git/hooks")
write(hooks / "post-checkout", "#!/bin/sh\\n")
write(hooks / "pre-commit", "#!/bin/sh\\nexit 0\\n")
(hooks / "pre-push").unlink()
(hooks / "commit-msg").chmod(0o644)
(hooks / "pre-rebase").unlink()
(hooks / "pre-rebase").symlink_to(HOME + "/mine")
""",
        ".git/config was changed, info/attributes was created, post-checkout was created, pre-commit was changed, "
        "pre-push was deleted, commit-msg was changed, pre-rebase was changed",
    ),
    "the user's configuration": (
        'for name in ("included", ".gitconfig", ".config/git/config"): write(f"{HOME}/{name}", "[core]")',
        "home/included was changed, .gitconfig was changed, .config/git/config was created",
    ),
    "a branch in a work tree of its own": (
        'forced("worktree", "add", "-q", "-b", "mine", HOME + "/mine", "side")',
        "heads/mine was created",
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
@side_by_side
def test_without_the_kernel_level_tampering_is_named_and_undone_by_the_printed_commands(
    world: World, name: str
) -> None:
    repo, (code, names) = busy_repository(world.path), TAMPERING[name]
    before = state_of(repo)
    result = act(repo, code, *OFF)
    assert (result.status, result.report["outcome"]) == (5, "rule-broken"), result.err
    broken = [moved for moved in result.report["moved"] if moved["broken"]]
    assert [part for part in names.split(", ") if not any(part in moved["what"] for moved in broken)] == []
    assert all(moved["what"] in result.err and moved["undo"] in result.err for moved in broken)
    for moved in broken:
        subprocess.run(["sh", "-c", moved["undo"]], cwd=repo.path, check=True, capture_output=True)
    assert state_of(repo) == before
    assert "agent/" not in repo.git("branch", "--all")


@side_by_side
def test_deleting_a_former_proposal_is_not_taken_for_another_runs_doing(world: World) -> None:
    assert act(world.repo, "write('made', '')", *OFF).report["branch"] == "agent/issue"
    result = act(world.repo, 'forced("branch", "-D", "agent/issue")', *OFF)
    assert result.status == 5 and "refs/heads/agent/issue was deleted" in result.report["message"]


@side_by_side
def test_without_the_kernel_level_a_change_to_the_supervisor_itself_is_undone_by_the_printed_command(
    world: World,
) -> None:
    own = world.repo.path / "agent_runner.py"
    shutil.copy(PROGRAM, own)
    before = own.read_bytes()
    result = act(world.repo, "with open(REAL + '/agent_runner.py', 'a') as own: own.write('# mine')", *OFF, program=own)
    assert result.status == 5
    (undo,) = [moved["undo"] for moved in result.report["moved"]]
    subprocess.run(["sh", "-c", undo], cwd=world.repo.path, check=True)
    assert own.read_bytes() == before


# ----------------------------------------------------------------- an agent that is not honest, with the kernel level

HOSTILE = """
import ctypes, glob, sysconfig
remote, cache = sys.argv[1:3]
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
stores = [".ssh", ".netrc", ".git-credentials", ".config/gh", ".config/glab-cli", ".of-no-forge"]
told["stores"] = {}
for name in stores:
    path = pathlib.Path(HOME, name)
    told["stores"][name] = os.listdir(path) if path.is_dir() else path.read_text()


def writes(path):
    try:
        with open(path + "/planted", "w"):
            os.remove(path + "/planted")
            return True
    except OSError:
        return False


folders = {"interpreter": os.path.dirname(os.path.realpath(sys.executable)), "prefix": sys.prefix}
folders |= {"site": HOME + "/.local/lib", "tool": sys.argv[3], "writable": sys.argv[4], "home": HOME}
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


def attack(place: Path) -> Told:
    """A run of an agent that knows every path and looks for a way out of the kernel sandbox."""
    place.mkdir()
    repo, remote = busy_repository(place), place / "remote.git"
    home, tools, free = home_of(repo), place / "tools", place / "free"
    for name in (".ssh/id", ".netrc", ".git-credentials", ".config/gh/hosts.yml", ".config/glab-cli/config.yml"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("secret")
    (home / ".of-no-forge").write_text("no login of a forge's")
    for made in (home / ".local/lib", home / ".config/git", home / ".cache/agent-runner/other", tools, free):
        made.mkdir(parents=True)
    repo.write(".gitignore", "node_modules\n.venv\n")
    repo.commit("ignore")
    repo.write("node_modules/.bin/tool", "#!/bin/sh\necho tool ran\n", mode=0o755)
    repo.write(".venv/pyvenv.cfg", "")
    repo.write(".venv/bin/checker", "#!/bin/sh\ntest -e tool-there\n", mode=0o755)
    (tools / "my-gate").write_text("#!/bin/sh\nexit 0\n")
    (tools / "my-gate").chmod(0o755)
    path = os.pathsep.join((str(tools), str(repo.path / ".venv/bin"), os.environ["PATH"]))
    before = state_of(repo)
    gate = ("--gate", "my-gate", "--gate", "checker", "--writable", str(free))
    arguments = (remote, home / ".cache/agent-runner", tools, free, repo.path / "node_modules/.bin/tool")
    result = run(repo, HOSTILE, *QUIET[2:], *REQUIRE, *gate, arguments=arguments, env={"PATH": path})
    return Told(result, told_by(repo, result), repo, before)


@pytest.fixture
def hostile(long_runs: dict[str, Told]) -> Told:
    return long_runs["hostile"]


@needs_bwrap
class TestHostile:
    def test_it_changes_nothing_outside_its_clone(self, hostile: Told) -> None:
        assert changed_state(hostile.repo, hostile.before) == set()
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
        assert stores.pop(".of-no-forge") == "no login of a forge's"
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
    """A run whose agent waits until the test has done something as another person."""

    AGENT = "write('made', ''); write(HOME + '/started', '')\nimport time\n" + (
        "while not os.path.exists(HOME + '/go'): time.sleep(0.01)\n"
    )

    def __init__(self, repo: Repository, level: str) -> None:
        self.home = home_of(repo)
        self.future = ThreadPoolExecutor(1).submit(run, repo, self.AGENT, *QUIET_SWITCH, "--sandbox", level)
        while not (self.home / "started").exists():
            assert not self.future.done(), self.future.result().err
            time.sleep(0.01)

    def end(self) -> Result:
        (self.home / "go").touch()
        return self.future.result()


QUIET_SWITCH = ("--gate", CHEAP_GATE, "--no-baseline", "--json")


@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_what_others_do_meanwhile_is_mentioned_and_not_punished(world: World, level: str) -> None:
    repo = busy_repository(world.path)
    beside, upstream = Repository(world.path / "beside"), Repository(world.path / "remote.git")
    repo.git("fetch", "-q", "origin")
    identity = ("-c", "user.name=B", "-c", "user.email=b@example.invalid")
    new = upstream.git(*identity, "commit-tree", upstream.tree("main"), "-p", "main", "-m", "by another person")
    upstream.git("update-ref", "refs/heads/other", new)
    upstream.git("tag", "v2", new)
    waiting = Meanwhile(repo, level)
    beside.git("commit", "-q", "--allow-empty", "-m", "by another person")
    repo.git("fetch", "-q", "origin")
    repo.write("calc.py", "edited by another person\n")
    result = waiting.end()
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err
    mentions = " ".join(result.report["mentions"])
    for moved in ("refs/heads/beside", "refs/remotes/origin/other", "refs/tags/v2", "your checkout was edited"):
        assert moved in mentions
    assert not [moved for moved in result.report["moved"] if moved["broken"]]
    assert (repo.path / "calc.py").read_text() == "edited by another person\n"


@needs_bwrap
@side_by_side
def test_under_the_kernel_level_nothing_that_moved_is_the_agents_doing(world: World) -> None:
    repo = busy_repository(world.path)
    waiting = Meanwhile(repo, "require")
    repo.git("commit", "-q", "--allow-empty", "-m", "by another person")
    repo.git("tag", "-f", "v1")
    repo.git("branch", "-D", "side")
    repo.git("stash", "clear")
    repo.git("config", "a.b", "c")
    repo.write(".git/hooks/pre-push", "exit 1\n")
    repo.git("switch", "-q", "-c", "elsewhere")
    result = waiting.end()
    assert (result.status, result.report["outcome"]) == (0, "proposed"), result.err
    mentions = " ".join(result.report["mentions"])
    for moved in ("heads/main", "tags/v1", "heads/side", "refs/stash", "/config", "hooks/pre-push", "HEAD was"):
        assert moved in mentions
    assert "not by the agent" in mentions
    assert repo.git("branch", "--show-current") == "elsewhere"


@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_a_second_proposal_made_meanwhile_is_not_punished(world: World, level: str) -> None:
    repo = world.repo
    waiting = Meanwhile(repo, level)
    words = ("issue-to-pr", "issue.md", *QUIET_SWITCH, "--sandbox", level)
    assert repo.run(*words, agent=world.agent("open('other', 'w')")).status == 0
    assert repo.git("branch", "--show-current") == "agent/issue"
    result = waiting.end()
    assert (result.status, result.report["branch"]) == (0, "agent/issue-2"), result.err
    assert repo.git("branch", "--show-current") == "agent/issue"


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


@needs_linux
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_a_process_that_left_its_session_its_parent_and_its_environment_is_ended(world: World, level: str) -> None:
    mark = f"mark-{os.getpid()}-{level}"
    result = act(world.repo, f"MARK = {mark!r}\n{DAEMON}", "--sandbox", level)
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


SERVER = """
import socket, threading
ours, theirs = socket.socketpair()
ours.settimeout(20)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while theirs.send(theirs.recv(1)):
            pass
    os._exit(0)
os.wait()
theirs.close()
while not os.path.exists(HOME + "/judged"):
    time.sleep(0.01)
for _ in range(30):  # while the supervisor ends what is left of the gate
    ours.send(b"x")
    assert ours.recv(1) == b"x", "my server was ended"
    time.sleep(0.01)
"""


@needs_linux
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_a_server_of_the_agents_lives_while_the_base_is_judged_beside_it(world: World, level: str) -> None:
    judged = home_of(world.repo) / "judged"
    gate = f"{PYTHON} -c 'open({str(judged)!r}, \"w\")'".replace("'/", '"/').replace("d',", 'd",')
    result = run(world.repo, f"import time\n{SERVER}", "--json", "--sandbox", level, "--gate", gate)
    assert result.status == 0, result.err


@pytest.mark.skipif(os.name == "nt", reason="no terminals of this kind")
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_the_agent_has_no_terminal_though_the_supervisor_has_one(world: World, level: str) -> None:
    code = """
try:
    told["terminal"] = str(open("/dev/tty"))
except OSError as error:
    told["terminal"] = error.strerror
"""
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    words = [word for word in QUIET if word != "--json"]
    result = run(world.repo, code, *words, "--sandbox", level, under=(sys.executable, "-c", terminal))
    assert result.status == 0, result.out
    told = json.loads(world.repo.git("show", "agent/issue:told.json"))
    assert told["terminal"] == "No such device or address"


@side_by_side
def test_the_supervisors_own_environment_is_untouched(world: World) -> None:
    code = f"""
        import os, sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import agent_runner
        before = dict(os.environ), os.getcwd()
        status = agent_runner.main({["issue-to-pr", "issue.md", *QUIET, *OFF]!r})
        sys.exit(status if (dict(os.environ), os.getcwd()) == before else 99)
    """
    environ = os.environ | {"AGENT_CMD": world.agent("open('made', 'w')"), "GH_TOKEN": "a token of mine"}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(words, cwd=world.repo.path, env=environ, capture_output=True).returncode == 0


# ------------------------------------------------------------------------------ where the run, or its user, stands

BWRAPS = {
    "absent": ("", "bubblewrap (bwrap) is not installed"),
    "broken": ("#!/bin/sh\necho no user namespaces for you >&2\nexit 1\n", "no user namespaces for you"),
}


@needs_linux
@pytest.mark.parametrize("name", BWRAPS)
@side_by_side
def test_without_a_working_bubblewrap_require_refuses_and_auto_says_so(world: World, name: str) -> None:
    repo, (script, reason) = world.repo, BWRAPS[name]
    tools = world.path / "tools"
    tools.mkdir()
    for tool in ("git", "sh", "rm", "chmod"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    if script:
        (tools / "bwrap").write_text(script)
        (tools / "bwrap").chmod(0o755)
    before, env = repo.state(), {"PATH": str(tools)}
    refused = repo.run("issue-to-pr", "issue.md", *REQUIRE, agent=world.agent("0"), env=env)
    assert refused.status == 3 and "--sandbox require: " in refused.out and reason in refused.out
    assert repo.state() == before
    words = ("--gate", CHEAP_GATE, "--no-baseline", "--no-switch")
    result = repo.run("issue-to-pr", "issue.md", *words, agent=world.agent("open('made', 'w')"), env=env)
    assert result.status == 0 and reason in result.out and "without the kernel level" in result.out


# AGENT_CMD, the folder to start in, and the gate, all of them programs that only the checkout holds.
UNTRACKED = {
    "by path": ("./agent.sh", "", "./check.sh"),
    "by a shell": ("sh ./agent.sh one two", "", "sh -e check.sh"),
    "from a sub-folder": ("../agent.sh", "sub", "sh ../check.sh"),
    "by name": ("my-agent", "", "my-check"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", UNTRACKED)
@side_by_side
def test_programs_that_only_the_checkout_holds_work_and_are_no_part_of_the_change(
    world: World, name: str, level: str
) -> None:
    repo, (command, folder, gate) = world.repo, UNTRACKED[name]
    repo.write(".gitignore", "*.log\nnode_modules\nprepare.sh\n")
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


@needs_bwrap
@side_by_side
def test_what_the_judge_would_find_outside_the_repository_cannot_be_planted(world: World) -> None:
    repo, home = world.repo, home_of(world.repo)
    tools = [home / "not-there-yet", home / "there", world.path / "tools"]
    for folder in tools[1:]:
        folder.mkdir()
    (tools[2] / "helper").write_text("#!/bin/sh\necho original\n")
    (tools[2] / "helper").chmod(0o755)
    env = {"PATH": os.pathsep.join((*map(str, tools), os.environ["PATH"]))}
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
    result = act(repo, code, *gates, *REQUIRE, env=env)
    assert result.status == 0, result.err
    assert [check["name"] for check in result.report["gate"] if not check["passed"]] == []
    assert not (home / ".gitconfig").exists() and not (home / ".config").exists()
    assert [moved["what"] for moved in result.report["moved"]] == []


@needs_bwrap
@side_by_side
def test_a_link_to_the_users_configuration_which_no_mount_can_hold_is_watched(world: World) -> None:
    repo, home = world.repo, home_of(world.repo)
    (home / "dotfiles").mkdir()
    (home / "dotfiles/gitconfig").write_text("[core]\n\tabbrev = 12\n")
    (home / ".gitconfig").symlink_to("dotfiles/gitconfig")
    code = """
try:
    write(HOME + "/.gitconfig", "[core]")
except OSError as error:
    told["through the link"] = str(error)
    os.unlink(HOME + "/.gitconfig")
    write(HOME + "/.gitconfig", "[core]")
"""
    result = act(repo, code, *REQUIRE)
    assert result.status == 5 and result.report["outcome"] == "rule-broken"
    subprocess.run(["sh", "-c", result.report["moved"][0]["undo"]], cwd=repo.path, check=True)
    assert (home / ".gitconfig").read_text() == "[core]\n\tabbrev = 12\n"


@needs_bwrap
@side_by_side
def test_login_agents_are_out_of_reach_unless_given_back(world: World) -> None:
    places = [world.path / name for name in ("agent", "runtime/agent", "runtime/bus")]
    (world.path / "runtime").mkdir()
    sockets = [socket.socket(socket.AF_UNIX) for _ in places]
    for each, place in zip(sockets, places, strict=True):
        each.bind(str(place))
        each.listen()
    code = """
import socket
told["reached"] = []
for place in sys.argv[1:]:
    try:
        socket.socket(socket.AF_UNIX).connect(place)
        told["reached"].append(place)
    except OSError:
        pass
"""
    for agent, words, reached in (
        (places[0], (), []),
        (places[1], ("--keep-env", "SSH_AUTH_SOCK"), [str(places[0]), str(places[1])]),
    ):
        env = {"SSH_AUTH_SOCK": str(agent), "XDG_RUNTIME_DIR": str(world.path / "runtime")}
        result = act(world.repo, code, *REQUIRE, *words, arguments=tuple(places), env=env)
        assert told_by(world.repo, result)["reached"] == reached
    for each in sockets:
        each.close()


@needs_bwrap
@side_by_side
def test_stores_and_configuration_are_found_where_the_xdg_variables_have_moved_them(world: World) -> None:
    repo, tmp_path = world.repo, world.path
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
    result = act(repo, code, *REQUIRE, env=env)
    told = told_by(repo, result)
    assert told["seen"] == [0, 0] and "refused" in told
    assert (tmp_path / "config/tool").read_text() == "mine"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("place", ["through a link", "in a sub-folder", "in a linked work tree", "cache inside"])
@side_by_side
def test_the_guard_holds_wherever_the_user_stands(world: World, level: str, place: str) -> None:
    repo = busy_repository(world.path)
    start, real, env = repo.path, repo.path, {}
    if place == "through a link":
        start = world.path / "link"
        start.symlink_to(repo.path)
    elif place == "in a sub-folder":
        repo.write("sub/issue.md", "# Do it\n")
        repo.commit()
        start = repo.path / "sub"
    elif place == "in a linked work tree":
        start = real = world.path / "beside"
    else:
        env = {"XDG_CACHE_HOME": str(repo.path / ".cache")}
        repo.write(".gitignore", ".cache\n")
        repo.commit()
    code = """
for number, folder in enumerate(FOLDERS):
    git(f"commit {number}", "-C", folder, "commit", "-q", "--allow-empty", "-m", "mine")
    told[f"there {number}"] = sorted(os.listdir(folder))
told["cwd"] = os.getcwd()
"""
    before = state_of(repo)
    code = f"FOLDERS = {[str(start), str(real), str(repo.path)]!r}\n{code}"
    result = act(Repository(start), code, "--sandbox", level, env=env, place=world.path)
    told = told_by(repo, result)
    assert changed_state(repo, before) == set()
    if level == "require":
        assert told["cwd"] == str(start.resolve())
        assert told["there 2"] == ([".git"] if place == "in a linked work tree" else told["there 1"])
    else:
        assert all(REFUSED in told["tried"][f"commit {number}"][1] for number in range(3))


SHADOWING = ["random", "queue", "types", "inspect", "traceback", "token", "signal", "ctypes", "urllib", "difflib"]


@side_by_side
def test_modules_beside_the_program_are_not_taken_for_the_standard_librarys(world: World) -> None:
    repo = world.repo
    for name in SHADOWING:
        repo.write(f"{name}.py", "raise SystemExit('the wrong module')\n")
    repo.commit()
    shutil.copy(PROGRAM, repo.path / "agent_runner.py")
    result = act(repo, "write('made', '')", *OFF, program=repo.path / "agent_runner.py")
    assert result.status == 0, result.err
    result = repo.run("issue-to-pr", "issue.md", "--sim", program=repo.path / "agent_runner.py")
    assert result.status == 3 and "--simulate" in result.out


ORDINARY = """
real("commit", "commit", "-q", "--allow-empty", "-m", "mine")
tried("umount", "unshare", "-Urm", "umount", "-l", REAL)
"""


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="all tests here run as an ordinary user already")
@pytest.mark.parametrize("level", LEVELS)
@side_by_side
def test_an_ordinary_user_has_the_same_guard(world: World, level: str) -> None:
    python, place = "/usr/bin/python3", Path(tempfile.mkdtemp()).resolve()
    repo = small_app(place / "app")
    try:
        (place / "home").mkdir()
        shutil.copy(PROGRAM, place / "agent_runner.py")
        (place / "agent.py").write_text(text_of(repo, ORDINARY))
        for path in (place, *place.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        words = ("issue-to-pr", "issue.md", "--gate", "true", "--no-baseline", "--no-switch", "--json")
        become = (
            "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
        )
        argv = [sys.executable, "-c", become, python, str(place / "agent_runner.py"), *words, "--sandbox", level]
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(place / "home"), "LC_ALL": "C.UTF-8"}
        env["AGENT_CMD"] = shlex.join([python, str(place / "agent.py")])
        if not os.access(python, os.X_OK):
            pytest.skip("no Python that every user may run")
        done = subprocess.run(argv, cwd=repo.path, env=env, capture_output=True, text=True)
        if "bubblewrap does not work here" in done.stderr:
            pytest.skip("user namespaces are forbidden to ordinary users here")
        assert done.returncode == 0, done.stderr
        as_root = ["git", "-c", "safe.directory=*", "-C", str(repo.path)]
        told = json.loads(subprocess.check_output([*as_root, "show", "agent/issue:told.json"]))
        status, said = told["tried"]["commit"]
        assert (status == 0) if level == "require" else (status != 0 and REFUSED in said)
        assert told["tried"]["umount"][0] != 0
        assert subprocess.check_output([*as_root, "rev-list", "--count", "main"]) == b"1\n"
    finally:
        shutil.rmtree(place)


# ------------------------------------------------------- what belongs to the repository, and does not lie in it


@needs_bwrap
@pytest.mark.parametrize("there", [True, False], ids=["there", "not-there-yet"])
@side_by_side
def test_hooks_folder_outside_the_repository_is_out_of_reach(world: World, there: bool) -> None:
    hooks = home_of(world.repo) / f"hooks-{there}"
    if there:
        hooks.mkdir()
    world.repo.git("config", "core.hooksPath", str(hooks))
    code = f"""
try:
    write({str(hooks / "post-checkout")!r}, "#!/bin/sh")
except OSError as error:
    told["planted"] = str(error)
"""
    result = act(world.repo, code, *REQUIRE)
    assert "Read-only" in told_by(world.repo, result)["planted"]
    assert result.report["moved"] == [] and not (hooks / "post-checkout").exists() and hooks.exists() == there


@needs_bwrap
@side_by_side
def test_git_folder_made_of_links_is_out_of_reach(world: World) -> None:
    main, place = world.repo, world.path / "linked"
    (place / ".git").mkdir(parents=True)
    for name in ("refs", "objects", "hooks", "config", "info", "packed-refs", "logs"):
        (place / ".git" / name).symlink_to(main.path / ".git" / name)
    main.git("pack-refs", "--all")
    shutil.copy(main.path / ".git/HEAD", place / ".git/HEAD")
    linked = Repository(place)
    linked.git("reset", "-q", "--hard")
    before = main.state()
    code = f"""
git("branch", "-C", {str(main.path)!r}, "branch", "evil")
try:
    write({str(main.path / ".git/hooks/pre-commit")!r}, "#!/bin/sh")
except OSError as error:
    told["planted"] = str(error)
"""
    result = act(linked, code, *REQUIRE)
    told = told_by(linked, result)
    assert told["tried"]["branch"][0] != 0 and "Read-only" in told["planted"]
    main.git("branch", "-q", "-D", "agent/issue")
    assert main.state() == before


@needs_bwrap
@side_by_side
def test_submodules_main_checkout_is_hidden_from_its_linked_worktree(world: World) -> None:
    top = small_app(world.path / "top")
    top.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(world.repo.path), "sub")
    sub, side = Repository(top.path / "sub"), Repository(world.path / "side")
    (sub.path / "mine.txt").write_text("precious\n")
    for key, value in (("user.name", "Ada"), ("user.email", "ada@example.invalid")):
        sub.git("config", key, value)
    sub.git("worktree", "add", "-q", "-b", "side", str(side.path))
    code = f"told['there'] = os.listdir({str(sub.path)!r})"
    assert told_by(side, act(side, code, *REQUIRE))["there"] == []


@pytest.mark.parametrize("code", ["os.mkfifo(REAL + '/.git/hooks/post-x')", "os.mkfifo(REAL + '/.git/info/grafts')"])
@side_by_side
def test_a_pipe_among_what_is_watched_is_told_and_not_waited_for(world: World, code: str) -> None:
    (world.repo.path / ".git/hooks").mkdir(exist_ok=True)
    (world.repo.path / ".git/info").mkdir(exist_ok=True)
    result = act(world.repo, code, *OFF)
    assert result.status == 5, result.err
    subprocess.run(["sh", "-c", result.report["moved"][0]["undo"]], cwd=world.repo.path, check=True)
    assert not list(world.repo.path.glob(".git/*/grafts")) + list(world.repo.path.glob(".git/hooks/post-x"))


@side_by_side
def test_an_agent_that_deletes_the_repository_broke_the_rule(world: World) -> None:
    result = act(world.repo, "import shutil\nshutil.rmtree(REAL + '/.git')", *OFF)
    assert result.status == 5 and result.report["outcome"] == "rule-broken", result.err


# ------------------------------------------------------------------------------------------- all of it, for a learner


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("command", [("issue-to-pr", "issue.md"), ("self-heal",)], ids=["issue-to-pr", "self-heal"])
@side_by_side
def test_simulated_escape_shows_what_became_of_each_try(world: World, level: str, command: tuple[str, ...]) -> None:
    repo = busy_repository(world.path)
    gate = f"{PYTHON} -c 'import agent_demo as a; assert a.apply_discount(200, 10) == 180'"
    words = ("--simulate", "escape", "--no-switch", "--no-baseline", "--sandbox", level, "--gate", gate)
    before = state_of(repo)
    result = repo.run(*command, *words, env={"HOME": str(home_of(repo))})
    assert result.status == 0 and "PROPOSED" in result.out, result.out
    lines = [line.partition("│")[2].strip() for line in result.out.splitlines() if "│" in line]
    became = {line[:34].strip(): line[34:].strip() for line in lines if " refused" in line or " worked" in line}
    here = {name for name, text in became.items() if text == "worked, on this disposable clone only"}
    own = {"commit here", "merge into main here", "tag here", "change Git's configuration here", "plant a hook here"}
    real = {name for name in became if "the real repository" in name}
    assert len(real) == 5 and here == (own | real if level == "require" else own)
    assert {"push by name", "push by address, forced, no hooks", "open a pull request with gh"} <= became.keys() - here
    branch = "agent/issue" if "issue.md" in command else "agent/self-heal"
    assert set(repo.git("diff", "--name-only", "main", branch).splitlines()) == {"agent_demo.py", "test_agent_demo.py"}
    assert changed_state(repo, before, branch) == set()
