"""The proposal: branch, commit, checkout, and the commands that a person would paste."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from conftest import Repository, Result, small_app
from test_record import CHEAP, ISSUE, RED, Words, paste, printed

NEW = 'open("new.py", "w").write("x = 1\\n")\n'
EDIT = f"import os\nos.mkdir('pkg')\nopen('pkg/a.py', 'w').write('x = 1')\n{NEW}"
EDIT += "open('calc.py', 'a').write('z = 1')\n"
switching = pytest.mark.parametrize("words", [(), ("--no-switch",)], ids=["switched", "not"])
STEMS = {"-Add: a  FEATURE~^:?*[@{\\ (v1.2)": "Add-a-FEATURE-v1.2", "x" * 99: "x" * 60}
STEMS |= {".日é..b.lock.lock": "e-b", "日": "issue"}


@pytest.mark.parametrize(("stem", "slug"), STEMS.items())
def test_branch_bears_the_stem(repo: Repository, agent: Any, stem: str, slug: str) -> None:
    repo.write(f"../{stem}.md", "# Add it\n")
    result = repo.run(ISSUE[0], f"../{stem}.md", *CHEAP, "--json", agent=agent(NEW))
    assert result.report["branch"] == f"agent/{slug}" == repo.git("branch", "--show-current")


@pytest.mark.parametrize("taken", ["agent/issue", "agent/issue/part"])
def test_existing_branch_is_left_and_said(repo: Repository, agent: Any, taken: str) -> None:
    repo.git("branch", taken)
    result = repo.run(*ISSUE, agent=agent(NEW))
    assert result.report["branch"] == "agent/issue-2"
    assert any("earlier" in m and "agent/issue" in m for m in result.report["mentions"])
    paste(printed(result)["drop it"], repo.path)
    assert repo.git("rev-parse", taken) == result.report["base"]
    assert repo.git("branch", "--format=%(refname:short)").split() == [taken, "main"]


UNSIGNABLE = "git config gpg.program false; git config commit.gpgSign true"
REFUSED = ("git switch -qc agent", "git branch my-agent; git switch -qc agent", UNSIGNABLE)


@pytest.mark.parametrize("before", REFUSED, ids=["branch", "two branches", "signing"])
def test_refusal_names_a_remedy_that_works(repo: Repository, agent: Any, before: str) -> None:
    paste(before, repo.path)
    result = repo.run(*ISSUE, agent=agent(NEW))
    assert result.status == 3 and not result.report["branch"]
    paste(re.findall(r"run: (git .*)", result.report["message"])[0], repo.path)
    assert repo.run(*ISSUE, agent=agent(NEW)).status == 0


TITLES = (
    "Hi @everyone, @team/core: fixes #12, GH-3, o/r#4 and !5; [skip-ci] [No CI] \x1b[3\u202e",
    "[ci skip] Fixes: https://github.com/o/r/issues/1 [skip actions]",
    "Add [notes] for @ and #, https://example.org/a; nothing else!",
)


@pytest.mark.parametrize("title", TITLES, ids=["hostile", "closing", "honest"])
def test_commit_is_the_users_and_harmless(repo: Repository, agent: Any, title: str) -> None:
    repo.write("issue.md", f"# {title}\n")
    text = '#!/bin/sh\ncat >&2\nprintf "\\n[GNUPG:] SIG_CREATED x\\n" >&2\necho signature\n'
    signer = str(repo.write("../signer", text, mode=0o755))
    for key in ("author.email=author@example.invalid", f"gpg.program={signer}", "commit.gpgSign=1"):
        repo.git("config", *key.split("="))
    report = repo.run(*ISSUE, agent=agent(NEW), env={"GIT_COMMITTER_NAME": "Eve"}).report
    told = repo.git("log", "-1", "--format=%an %ae %cn %ce %P %T", "agent/issue").split()
    assert told[:4] == ["Ada", "author@example.invalid", "Eve", "ada@example.invalid"]
    assert told[4:] == [report["base"], report["tree"]]
    assert "gpgsig signature" in repo.git("cat-file", "commit", "agent/issue")
    message = repo.git("log", "-1", "--format=%B", "agent/issue")
    assert message.split("\n")[0] == report["proposal"]["title"]
    bad = r"@\w|#\d|\bgh-\d|!\d|://\S+/\d|\[[^]\n]*\b(skip|no)\b.*\]|[\x00-\x09\x0b-\x1f\u202e]"
    assert not re.search(bad, message, re.IGNORECASE)
    assert re.search(bad, title, re.IGNORECASE) or message.split("\n")[0] == title


FILTER = "git config filter.f.clean 'sed s/mine/theirs/'; echo calc.py filter=f > .gitattributes"
SIDE = "$(git commit-tree HEAD^{tree} -m side)"
IN_THE_WAY = {
    "edit": "echo mine=1 >> test_calc.py",
    "staged file": "echo mine=1 > staged.py; git add staged.py",
    "untracked file": "echo mine > new.py",
    "untracked file for a folder": "echo mine > pkg",
    "untracked folder for a file": "mkdir new.py; touch new.py/mine",
    "ignored folder for a file": "echo new.py/ > .git/info/exclude; mkdir new.py; touch new.py/x",
    "dangling link": "ln -s nowhere new.py",
    "edit hidden by a flag": "git update-index --assume-unchanged calc.py; echo mine=1 >> calc.py",
    "edit hidden by a filter": f"{FILTER}; echo theirs=1 > calc.py; git add -A; git commit -qm x; "
    "echo mine=1 > calc.py; git add calc.py",
    "merge": f"git merge -q -s ours --no-commit --allow-unrelated-histories {SIDE}",
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_switch_never_overwrites(repo: Repository, agent: Any, name: str) -> None:
    paste(IN_THE_WAY[name], repo.path)
    before = repo.state()
    result = repo.run(*ISSUE, agent=agent(EDIT))
    assert result.report["branch"] == "agent/issue", result.err
    assert any("HEAD" in mention for mention in result.report["mentions"])
    paste(printed(result)["drop it"], repo.path)
    assert repo.state() == before
    assert (name == "merge") == (repo.path / ".git/MERGE_HEAD").exists()


@pytest.mark.parametrize("head", ["main", "--detach"])
def test_clean_checkout_is_switched(repo: Repository, agent: Any, head: str) -> None:
    repo.git("switch", "-q", head)
    repo.write("notes.txt", "untracked, in nobody's way")
    repo.write(".git/hooks/pre-commit", "#!/bin/sh\n")  # never run, since not executable
    before = repo.state()
    result = repo.run(*ISSUE, agent=agent(EDIT))
    assert repo.git("branch", "--show-current") == "agent/issue"
    assert repo.git("status", "--porcelain") == "?? notes.txt"
    assert not any("hooks" in mention for mention in result.report["mentions"])
    paste(printed(result)["drop it"], repo.path)
    assert repo.state() == before


@pytest.mark.parametrize("what", ["switch -q -c elsewhere", "commit -q --allow-empty -m mine"])
def test_checkout_that_moved_is_left(repo: Repository, agent: Any, what: str) -> None:
    """As a person does it beside the run: with a Git that knows nothing of the run."""
    words = ["env", "-i", f"PATH={os.environ['PATH']}", "git", "-C", str(repo.path), *what.split()]
    report = repo.run(*ISSUE, agent=agent(f"{EDIT}\nos.system({shlex.join(words)!r})\n")).report
    assert report["outcome"] == "proposed" and any("moved" in m for m in report["mentions"])
    assert repo.git("branch", "--show-current") == ("elsewhere" if "switch" in what else "main")
    assert repo.git("status", "--porcelain") == ""
    assert repo.git("rev-parse", "agent/issue^") == report["base"]


def test_switch_that_fails_half_way_is_taken_back(repo: Repository, agent: Any) -> None:
    fails_here = f'test "$(pwd -P)" != {shlex.quote(str(repo.path.resolve()))} && cat'
    for key, value in (("smudge", fails_here), ("clean", "cat"), ("required", "true")):
        repo.git("config", f"filter.picky.{key}", value)
    repo.write(".gitattributes", "*.big filter=picky\n")
    repo.commit()
    repo.write("notes.txt", "untracked")
    before, paths = repo.state(), set(repo.path.glob("*"))
    work = EDIT + 'open("pkg/n.big", "w").write("x")\nopen("zz.py", "w").write("1\\n")\n'
    result = repo.run(*ISSUE, agent=agent(work))
    assert result.report["branch"] == "agent/issue", result.err
    assert any("HEAD" in m and "taken back" in m for m in result.report["mentions"])
    assert repo.git("status", "--porcelain") == "?? notes.txt"
    paste(printed(result)["drop it"], repo.path)
    assert (repo.state(), set(repo.path.glob("*"))) == (before, paths)  # no empty folder is left


TITLE = 'Say "it\'s" & done'
GITHUB, FORK = "https://github.com/org/r.git", "git@github.com:ada/r.git"
COMPARE = "https://github.com/org/r/compare/"
FORKED = f"origin={GITHUB} fork={FORK} remote.pushDefault=fork"
LAYOUTS = {  # what the repository has; how the address of the form starts; the branch in it
    "GitHub": (f"origin={GITHUB}", COMPARE, "agent/x"),
    "GitHub, ssh": ("origin=ssh://git@ssh.github.com:443/org/r.git", COMPARE, "agent/x"),
    "GitHub, scp-like": ("origin=git@github.com:org/r", COMPARE, "agent/x"),
    "login in the address": ("origin=https://me:t0ken@github.com/org/r/", COMPARE, "agent/x"),
    "GitLab": ("origin=ssh://git@gitlab.x:22/g/s/r", "https://gitlab.x/g/s/r/-/merge_r", "agent/x"),
    "Forgejo": ("origin=git@codeberg.org:o/r.git", "https://codeberg.org/o/r/compare/", "agent/x"),
    "unknown host": ("origin=https://git.example/o/r.git", "https://git.example/o/r", ""),
    "a folder": ("its=/srv/r.git", "", ""),
    "fork, upstream": (f"origin={FORK} upstream={GITHUB}", COMPARE, "ada:agent/x"),
    "upstream elsewhere": (f"origin={GITHUB} upstream=git@codeberg.org:o/r", COMPARE, "agent/x"),
    "push default": (f"{FORKED} branch.main.remote=origin", COMPARE, "ada:agent/x"),
    "asked-for base": (f"origin={GITHUB} --base=origin/v1", f"{COMPARE}v1...", "agent/x"),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PATH that holds all of this machine's programs, those of forges aside."""
    place = tmp_path_factory.mktemp("bin")
    for folder in os.get_exec_path():
        for file in Path(folder).glob("*"):
            if file.name not in ("gh", "glab", "tea") and not os.path.lexists(place / file.name):
                (place / file.name).symlink_to(file)
    return str(place)


def proposed(repo: Repository, agent: Any, layout: str, path: str) -> Result:
    options = [item for item in layout.split() if item.startswith("--")]
    for key, value in (item.split("=") for item in layout.split() if item not in options):
        repo.git("config", key if "." in key else f"remote.{key}.url", value)
    for ref in ("main", "v1"):
        repo.git("update-ref", f"refs/remotes/origin/{ref}", "HEAD")
    repo.write("../x.md", f"# {TITLE}\n")
    words = ("issue-to-pr", "../x.md", *CHEAP, "--json", *options)
    result = repo.run(*words, agent=agent(NEW), env={"PATH": path})
    assert result.report["branch"] == "agent/x", result.err
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_commands_fit_the_remote(repo: Repository, agent: Any, machine: str, name: str) -> None:
    layout, start, head = LAYOUTS[name]
    result = proposed(repo, agent, layout, machine)
    steps = printed(result)
    assert [*steps.values()] == result.report["proposal"]["commands"]
    remote = {"a folder": "its", "push default": "fork"}.get(name, "origin")
    assert steps["push it"] == f"git push -u {remote} agent/x"
    form = shlex.split(steps.get("open the form", ""))
    assert form[:-1] == (["python3", "-m", "webbrowser"] if start else [])
    address = unquote(form[-1]) if form else ""
    assert address.startswith(start) and "@" not in address
    assert re.search(rf"[/.=]{head}([?&]|$)", address) if head else address == start
    assert start != COMPARE or f"title={TITLE}" in address


@pytest.mark.parametrize("name", ["GitHub", "fork, upstream", "GitLab", "Forgejo"])
def test_forges_program_gets_a_draft(repo: Repository, agent: Any, machine: str, name: str) -> None:
    text = f"#!{sys.executable} -S\nimport json, pathlib, sys\n"
    text += "print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]))\n"
    for program in ("gh", "glab", "tea"):
        repo.write(f"../bin/{program}", text, mode=0o755)
    path = f"{repo.path.parent / 'bin'}{os.pathsep}{machine}"
    layout, _, head = LAYOUTS[name]
    result = proposed(repo, agent, layout, path)
    step = printed(result)["open a draft"]
    tool, _, verb, *words = json.loads(paste(step, repo.path, os.environ | {"PATH": path}))
    assert (tool, verb) == ({"GitLab": "glab", "Forgejo": "tea"}.get(name, "gh"), "create")
    told = dict(pairwise(words))
    assert told["--source-branch" if tool == "glab" else "--head"] == head
    assert re.sub("^WIP: ", "", told["--title"]) == TITLE
    assert told["--title"].startswith("WIP: ") or "--draft" in words  # tea has no such option
    text = Path(told["--body-file"]).read_text() if tool == "gh" else told["--description"]
    assert text.rstrip() == Path(result.report["proposal"]["body_file"]).read_text().rstrip()


@pytest.mark.parametrize("kind", ["switched", "not switched", "kept"])
def test_printed_commands_work_as_pasted(agent: Any, tmp_path: Path, kind: str) -> None:
    """Also in a folder and on a branch whose names need quoting."""
    app, bare = small_app(tmp_path / 'it\'s "an" app'), Repository(tmp_path / "re mote's.git")
    place = app.write("it's here/issue.md", "# Triple it\n").parent
    subprocess.run(["git", "init", "-q", "--bare", str(bare.path)], check=True)
    if kind == "not switched":
        app.git("remote", "add", "it's|origin", str(bare.path))
    app.commit()
    app.git("branch", "my-issue")
    app.git("switch", "-q", "-c", 'it\'s-"quoted"&|`-#1')
    ours = ("refs/heads", "refs/agent-runner")
    before = app.git("for-each-ref", *ours), app.git("symbolic-ref", "HEAD")
    more = {"switched": (), "not switched": ("--no-switch",), "kept": ("--gate", RED)}[kind]
    result = app.run(*ISSUE, *more, agent=agent(NEW), cwd=place.name)
    steps = printed(result)
    assert (app.git("symbolic-ref", "HEAD") == before[1]) == (kind != "switched")
    assert "+x = 1" in paste(steps["look at it"], place)
    if kind == "kept":
        paste(steps["take it over"], place)
        assert app.git("branch", "--show-current") == "my-issue-2"
        assert app.tree("HEAD") == result.report["tree"] and app.git("status", "-s") == ""
        paste("git switch -q - && git branch -q -D my-issue-2", place)
    else:
        if kind == "switched":
            paste(steps["add a remote"].replace("ADDRESS", shlex.quote(str(bare.path))), place)
        paste(steps["push it"], place)
        assert bare.git("for-each-ref", "--format=%(refname)") == "refs/heads/agent/issue"
        assert bare.tree("agent/issue") == result.report["tree"]
    paste(steps["drop it"], place)
    assert (app.git("for-each-ref", *ours), app.git("symbolic-ref", "HEAD")) == before


@switching
def test_hooks_are_told_and_can_be_run(repo: Repository, agent: Any, words: Words) -> None:
    folder = ".husky" if words else ".git/hooks"
    for hook in ("pre-commit", "commit-msg"):
        repo.write(f"{folder}/{hook}", f"#!/bin/sh\necho {hook} >> ../ran\n", mode=0o755)
    repo.git("config", "core.hooksPath", "/dev/null")
    repo.commit()
    repo.git("config", "core.hooksPath", folder)
    ran, result = repo.path.parent / "ran", repo.run(*ISSUE, *words, agent=agent(NEW))
    assert not ran.exists()
    (mention,) = (m for m in result.report["mentions"] if "hooks" in m)
    paste(re.findall(r"(?:git switch|git commit).*", mention)[0], repo.path)
    assert ran.read_text().split() == ["pre-commit", "commit-msg"]
    assert repo.tree("agent/issue") == result.report["tree"]
    assert "Signed-off-by: Ada" in repo.git("log", "-1", "--format=%B", "agent/issue")


@pytest.mark.parametrize("words", ["--gate=ruff", "--gate=ruff --no-switch", ""])
def test_rewrite_by_the_gate_is_a_patch(repo: Repository, agent: Any, words: str) -> None:
    repo.write("ruff.toml", "fix = true\n")
    repo.commit()
    work = agent('open("new.py", "w").write("import os\\nx = 1\\n")\n')
    words = words.replace("=ruff", "='ruff check .'")
    result = repo.run(*ISSUE[:-2], *shlex.split(words), agent=work)
    assert result.status == 0 and repo.git("show", "agent/issue:new.py") == "import os\nx = 1"
    assert Path(result.report["record"], "rewritten.patch").is_file()
    (mention,) = (m for m in result.report["mentions"] if "rewrote" in m)
    paste(mention.rpartition(": ")[2], repo.path)
    assert (repo.path / "new.py").read_text() == "x = 1\n"
