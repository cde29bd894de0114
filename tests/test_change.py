"""What is read out of the workspace: exactly what the agent did, and nothing of the user's."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, LEVELS, Repository, Result, needs_bwrap

ISSUE = ("issue-to-pr", "issue.md", "--json", "--no-baseline")


def drive(repo: Repository, agent: str, *options: str, level: str = "off") -> Result:
    """A run that is about the change and not about the gate."""
    words = (*ISSUE, "--gate", CHEAP_GATE, "--no-switch", "--sandbox", level, *options)
    return repo.run(*words, agent=agent)


def sh(script: str) -> str:
    """An agent of a few lines of shell."""
    return shlex.join(["sh", "-ec", script])


def changes(repo: Repository, commit: str) -> set[str]:
    """What a commit changes, file by file: Git's letter and the path."""
    words = ("diff-tree", "-r", "-z", "--no-renames", "--name-status", f"{commit}^", commit)
    listing = repo.git(*words).split("\0")
    return {f"{letter} {path}" for letter, path in zip(listing[::2], listing[1::2], strict=False)}


def proposed(repo: Repository, result: Result) -> set[str]:
    """The changes of a proposal, made sure that it is the judged tree on the base."""
    assert result.status == 0, result.err
    report = result.report
    assert repo.tree(report["branch"]) == report["tree"]
    assert repo.git("rev-parse", f"{report['branch']}^") == report["base"]
    return changes(repo, report["branch"])


def told(result: Result, kind: str) -> set[str]:
    return {f["path"] for f in result.report["findings"] if f["kind"] == kind}


def state_without(repo: Repository, result: Result) -> dict[str, str]:
    """The user's side of the repository, once the proposal has been dropped again."""
    repo.git("branch", "-q", "-D", result.report["branch"])
    return repo.state()


# ----------------------------------------------------------------- what the agent does to its clone

EDITS = "echo '# mine' >> calc.py; echo >> test_calc.py; echo > new.py"
EDITED = {"M calc.py", "M test_calc.py", "A new.py"}
# After these edits the agent hides them, rewrites its history, or plants programs.
TRICKS = {
    "no git": "rm -rf .git",
    "the user's git": "rm -rf .git; echo 'gitdir: {user}/.git' > .git",
    "hidden": """
        git add -A; git commit -qm mine; git tag mine; git checkout -q -b other
        echo > gone; git add gone; git stash -q; git branch -D main
        git update-index --assume-unchanged calc.py; git update-index --skip-worktree test_calc.py
        git replace HEAD $(git commit-tree -m fake $(git mktree < /dev/null))
        mkdir -p .git/info; echo '*' >> .git/info/exclude; git config core.excludesFile .git/HEAD
        git config core.sparseCheckout true; git config core.bare true
        git config core.worktree {user}
        """,
    "planted": """
        mkdir -p .git/hooks .git/info; echo '* filter=x diff=x eol=crlf' > .git/info/attributes
        for key in core.fsmonitor core.pager diff.external diff.x.textconv filter.x.clean \\
            filter.x.process uploadpack.packObjectsHook core.alternateRefsCommand gpg.program
        do git config $key 'touch {mark}; cat'; done
        for hook in post-checkout reference-transaction post-index-change pre-commit
        do printf '#!/bin/sh\\ntouch {mark}\\n' > .git/hooks/$hook; chmod +x .git/hooks/$hook; done
        git config commit.gpgSign true; git config core.hooksPath .git/hooks
        echo '* filter=x diff=x' > .gitattributes
        """,
}


@pytest.mark.parametrize(
    ("name", "level"),
    [*((n, "off") for n in TRICKS), pytest.param("planted", "require", marks=needs_bwrap)],
)
def test_nothing_in_the_clones_git_folder_counts(
    repo: Repository, tmp_path: Path, name: str, level: str
) -> None:
    before, mark = repo.state(), tmp_path / "mark"
    script = TRICKS[name].replace("{user}", str(repo.path)).replace("{mark}", str(mark))
    result = drive(repo, sh(f"{EDITS}; {script}"), level=level)
    assert proposed(repo, result) == EDITED
    assert state_without(repo, result) == before and not mark.exists()


def test_settings_planted_in_the_home_folder_run_nothing_and_hide_nothing(
    repo: Repository, hermetic: Path, tmp_path: Path
) -> None:
    keys = "core.fsmonitor uploadpack.packObjectsHook core.alternateRefsCommand filter.x.clean"
    plant = f"for key in {keys}; do git config --global $key 'touch {tmp_path}/mark; false'; done"
    home = "mkdir -p ~/.config/git; echo '*' > ~/.config/git/ignore"
    script = f"{EDITS}; {plant}; {home}; echo '* filter=x' > ~/.config/git/attributes"
    result = drive(repo, sh(script))
    assert not (tmp_path / "mark").exists()
    assert (result.status, result.report["outcome"]) == (5, "rule-broken"), result.err
    (hermetic / ".gitconfig").unlink()
    assert changes(repo, result.report["kept"]) == EDITED


REPLACED = {
    "link": 'here="$PWD"; cd ..; rm -rf "$here"; ln -s {user} "$here"',
    "folder": 'here="$PWD"; cd ..; mv "$here" away; mkdir "$here"; echo > "$here/x"',
    "gone": 'rm -rf "$PWD"',
}


@pytest.mark.parametrize("name", REPLACED)
def test_workspace_that_was_replaced_is_not_read(repo: Repository, name: str) -> None:
    repo.write("untracked.py", "mine\n")
    before = repo.state()
    result = drive(repo, sh(REPLACED[name].replace("{user}", str(repo.path))))
    assert (result.status, result.report["kept"]) == (4, None), result.err
    assert repo.git("for-each-ref", "refs/agent-runner/") == "" and repo.state() == before


# ------------------------------------------------------------------------------ what is the user's


@pytest.fixture
def at_work(repo: Repository) -> Repository:
    """The repository with every kind of thing that a user may have lying in the checkout."""
    repo.write(".gitignore", "*.env\nmodules/\n")
    for name in ("half.py", "sub/x.py"):
        repo.write(name, "x = 1\n")
    repo.commit()
    repo.write("half.py", "x = 2\n")
    repo.write("staged.py", "x = 1\n")
    repo.git("add", "half.py", "staged.py")
    repo.write("half.py", "x = 3\n")
    repo.git("rm", "-q", "--cached", "test_calc.py")
    for name in ("untracked.py", "new.py", "sub/own.py", "a.env", "sub/b.env", "modules/x/y.js"):
        repo.write(name, "the user's own\n")
    return repo


@pytest.mark.parametrize("level", LEVELS)
def test_uncommitted_work_is_neither_swept_in_nor_changed(at_work: Repository, level: str) -> None:
    before = at_work.state()
    absent = "for n in untracked.py a.env modules sub/own.py; do test ! -e $n; done"
    edit = "test -e test_calc.py; echo >> half.py; echo > new.py; echo > staged.py; git add -A"
    result = drive(at_work, sh(f"{absent}; {edit}"), level=level)
    assert proposed(at_work, result) == {"M half.py", "A new.py", "A staged.py"}
    assert at_work.git("show", f"{result.report['branch']}:half.py") == "x = 1"
    assert state_without(at_work, result) == before


@pytest.mark.parametrize("target", ["{user}/sub", "{other}"])
def test_link_to_the_users_files_brings_none_of_them_in(
    at_work: Repository, tmp_path: Path, target: str
) -> None:
    """The folder of a committed file becomes a link to where a file of that name lies."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.py").touch(mode=0)
    before = at_work.state()
    target = target.format(user=at_work.path, other=tmp_path / "other")
    result = drive(at_work, sh(f"rm -r sub; ln -s {target} sub; echo >> calc.py"))
    assert proposed(at_work, result) - {"D sub/x.py"} == {"M calc.py"}
    assert "sub" in told(result, "left-out") and state_without(at_work, result) == before
    assert (tmp_path / "other/x.py").stat().st_mode & 0o777 == 0


# ---------------------------------------------------------------- what is read, and how it is read

SEVERAL = r"""
rm calc.py; mkdir calc.py; echo x > calc.py/a; rm -r d; echo x > d
chmod +x run.sh; chmod 0 test_calc.py; mkdir locked; echo x > locked/x; chmod 0 locked/x locked
mkdir -p empty/deeper; : > void; git mv moved.txt 'to here.txt'
touch -- "it's" '"quoted"' -- -rf ' a ' 'b\c' ':(top)x' '*' ü '#x' '!y' Calc.py ' ' 'a
b' "$(printf 'n\377')" "$(printf '\001')"
ln -s run.sh link; ln -s gone dangling; ln -s ../run.sh calc.py/up; ln -s . self
echo > a.log; mkdir out; echo > out/x; echo > 'early:ignored'; echo 'early*' >> .gitignore
"""
SEVERAL_CHANGES = {
    *("D calc.py", "A calc.py/a", "A calc.py/up", "M run.sh", "A locked/x", "M .gitignore"),
    *(
        "D d/e/f.py",
        "A d",
        "A void",
        "D moved.txt",
        "A to here.txt",
        "A link",
        "A dangling",
        "A self",
        "A Calc.py",
    ),
    *("A it's", 'A "quoted"', "A --", "A -rf", "A  a ", "A b\\c", "A :(top)x", "A *", "A ü"),
    *("A #x", "A !y", "A  ", "A a\nb", "A n\udcff", "A \x01"),
}
# A setup that changes a tracked file and adds one: the agent then does not start from the base.
SETUP = ("--setup", "sh -c 'echo generated >> issue.md; echo > made.by.setup'")


@pytest.mark.parametrize("options", [(), SETUP], ids=["plain", "after setup"])
def test_change_is_what_lies_on_disk_and_is_not_ignored(
    repo: Repository, options: tuple[str, ...]
) -> None:
    repo.write("run.sh", "#!/bin/sh\n")
    repo.write("d/e/f.py", "x = 1\n")
    repo.write("moved.txt", "a text that moves\n")
    repo.write(".gitignore", "*.log\nout/\n")
    repo.commit()
    several = drive(repo, sh(SEVERAL), *options)
    assert proposed(repo, several) == SEVERAL_CHANGES and told(several, "left-out") == set()
    branch = several.report["branch"]
    assert "R100\tmoved.txt" in repo.git("diff", "-M", "--name-status", "main", branch)
    listing = repo.git("ls-tree", branch, "link", "run.sh", "void").splitlines()
    assert [line.split()[0] for line in listing] == ["120000", "100755", "100644"]
    assert "run.sh" in told(several, "mode")
    assert all(f"{name} is hidden" in several.err for name in ("a.log", "out/", "early:ignored"))
    all_gone = drive(repo, sh("rm -rf -- * .gitignore"), *options)
    assert proposed(repo, all_gone) == {f"D {path}" for path in repo.git("ls-files").split()}
    nothing = drive(repo, sh("touch calc.py; cp calc.py x; mv x calc.py; mkdir empty"), *options)
    assert nothing.status == 4 and "changed nothing" in nothing.report["message"]


def test_edit_of_the_same_length_and_time_is_not_missed(repo: Repository) -> None:
    script = "touch -r calc.py old; sed -i s/2/3/ calc.py; touch -r old calc.py; rm old"
    assert proposed(repo, drive(repo, sh(script))) == {"M calc.py"}


def test_noise_of_line_endings_and_filters_is_no_part_of_the_change(repo: Repository) -> None:
    """Files that Git, asked here, would call changed although nobody touched them."""
    for name in ("crlf.c", "crlf.bat", "other.bat", "touched.c"):
        (repo.path / name).write_bytes(b"one\r\ntwo\r\n")
    for name in ("loud.txt", "quiet.txt"):
        repo.write(name, "loud\n")
    repo.git("config", "filter.shout.clean", "tr a-z A-Z")
    repo.commit()
    repo.write(".gitattributes", "*.txt filter=shout\n*.bat text eol=crlf\n*.c text\n")
    repo.git("add", ".gitattributes")
    repo.git("commit", "-q", "-m", "not normalised")
    repo.git("config", "--global", "core.autocrlf", "true")
    before = repo.state()
    edit = "printf 'three\\r\\n' >> crlf.bat; echo four >> loud.txt; echo '# five' >> calc.py"
    result = drive(repo, sh(f"{edit}; touch touched.c quiet.txt; rm other.bat"))
    assert proposed(repo, result) == {"M crlf.bat", "M loud.txt", "M calc.py", "D other.bat"}
    branch = result.report["branch"]
    assert repo.git("show", f"{branch}:loud.txt") == "LOUD\nFOUR"
    assert repo.git("diff", "--numstat", "main", branch, "calc.py") == "1\t0\tcalc.py"
    assert state_without(repo, result) == before
    assert "changed nothing" in drive(repo, sh("touch *")).report["message"]


# -------------------------------------------------------------------------------- left out and told

# What the agent does, what is told of it, and what is proposed beside `M calc.py`.
UNFIT: dict[str, tuple[str, set[str], set[str]]] = {
    "repositories": (
        "for n in a b c k/e; do mkdir -p $n; echo > $n/x; done; git init -q a; git -C a add .; "
        "git -C a -c user.name=a -c user.email=a commit -qm mine; git init -q b; "
        "git init -q --separate-git-dir=../apart c; git init -q k/e; echo > k/y; "
        "git init -q d; cd d; git add e; echo '# mine' >> e/f.py",
        {"a", "b", "c", "k/e"},
        {"A k/y", "M d/e/f.py"},
    ),
    "links": (
        "mkdir q; ln -s ../.. q/up; ln -s ~ home; ln -sf /etc/hosts issue.md; ln -s ../d q/in",
        {"q/up", "home", "issue.md"},
        {"A q/in"},
    ),
    "detour": ("mkdir -p q/r; ln -s ../.. q/r/t; ln -s q/r/t/../x out", {"out"}, {"A q/r/t"}),
    "link to the workspace": ('ln -s "$PWD/calc.py" own; ln -s calc.py x', {"own"}, {"A x"}),
    "link into git": ("ln -s .git/config own; ln -s calc.py x", {"own"}, {"A x"}),
    "special": ("rm issue.md; mkfifo issue.md; echo > x", {"issue.md"}, {"A x"}),
    "special, new": ("mkfifo pipe d/pipe; echo > x", {"pipe", "d/pipe"}, {"A x"}),
    "special, of git's": ("rm .gitignore; mkfifo .gitignore", {".gitignore"}, set()),
    "hard links": (
        "ln {user}/a.env stolen; ln -f {user}/a.env issue.md; echo > x; ln x y",
        {"stolen", "issue.md"},
        {"A x", "A y"},
    ),
    "large": ("truncate -s 101M new issue.md", {"new", "issue.md"}, set()),
    "encodings": (
        r"printf odd > bad.u16; printf '\376\377\0a' > good.u16; printf odd > old.u16",
        {"bad.u16", "old.u16"},
        {"A good.u16"},
    ),
    "names": ("echo > git~1; mkdir d/.GIT; echo > d/.GIT/x", {"git~1", "d/.GIT/x"}, set()),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_no_commit_can_hold_is_left_out_and_told_and_the_rest_is_proposed(
    repo: Repository, name: str
) -> None:
    repo.write(".gitignore", "*.env\n")
    repo.write("d/e/f.py", "x = 1\n")
    repo.write(".gitattributes", "*.u16 working-tree-encoding=UTF-16 text\n")
    (repo.path / "old.u16").write_bytes("old\n".encode("utf-16"))
    repo.commit()
    repo.write("a.env", "TOKEN=secret\n")
    before = repo.state()
    script, left_out, beside = UNFIT[name]
    script = script.replace("{user}", str(repo.path))
    result = drive(repo, sh(f"echo '# mine' >> calc.py; {script}"))
    assert proposed(repo, result) == {"M calc.py"} | beside
    assert told(result, "left-out") == left_out
    assert state_without(repo, result) == before


def test_path_that_is_too_long_is_left_out_and_told(repo: Repository, agent: Any) -> None:
    deep = "for _ in range(45): os.mkdir('0' * 100); os.chdir('0' * 100)"
    result = drive(repo, agent(f"import os\nopen('x', 'w')\n{deep}\nopen('y', 'w')"))
    assert proposed(repo, result) == {"A x"}
    assert any(path.startswith("000") for path in told(result, "left-out"))


def test_hard_links_within_the_workspace_are_ordinary_files(repo: Repository) -> None:
    repo.write(".gitignore", "out/\n")
    repo.commit()
    result = drive(repo, sh("ln calc.py a; mkdir out; echo > out/x; ln out/x b"))
    assert proposed(repo, result) == {"A a", "A b"}, result.err


@pytest.mark.parametrize("name", ["git init -q mine; echo > mine/x", "mkdir .x; echo > .x/y"])
def test_work_that_is_all_left_out_is_told_and_not_proposed(repo: Repository, name: str) -> None:
    before = repo.state()
    result = drive(repo, sh(name))
    assert result.status in (1, 4) and result.report["branch"] is None, result.err
    assert told(result, "left-out") | told(result, "put-back") in ({"mine"}, {".x/y"})
    assert repo.state() == before


# -------------------------------------------------------------------------- the supervisor's paths

STEERING = r"""
mkdir -p .github/workflows .vscode sub/.agent; echo 'on: push' > .github/workflows/own.yml
echo '# obey' | tee -a AGENTS.md > sub/CLAUDE.md; rm -f Jenkinsfile; echo {} > .vscode/x.json
mv .editorconfig moved.cfg; chmod +x .hidden; echo x | tee sub/.agent/x > .hidden
echo '*.tmp' >> .gitignore; touch sub/.gitkeep; echo '# mine' >> calc.py; echo > Jenkinsfile.md
"""
PUT_BACK = {
    *("A .github/workflows/own.yml", "M AGENTS.md", "A sub/CLAUDE.md", "D Jenkinsfile"),
    *("A .vscode/x.json", "D .editorconfig", "M .hidden", "A sub/.agent/x"),
}
NOT_STEERING = {"M .gitignore", "A sub/.gitkeep", "M calc.py", "A Jenkinsfile.md", "A moved.cfg"}


@pytest.fixture
def steered(repo: Repository) -> Repository:
    for name in ("AGENTS.md", "Jenkinsfile", ".editorconfig", ".hidden", ".gitignore"):
        repo.write(name, f"# the supervisor's {name}\n")
    repo.commit()
    return repo


def test_supervisors_paths_are_put_back_told_and_kept(steered: Repository) -> None:
    before = steered.state()
    result = drive(steered, sh(STEERING))
    assert proposed(steered, result) == NOT_STEERING
    assert told(result, "put-back") == {change[2:] for change in PUT_BACK}
    advice = " ".join(finding["detail"] for finding in result.report["findings"])
    assert all(f"--allow {path}" in advice for path in told(result, "put-back"))
    assert changes(steered, result.report["kept"]) == NOT_STEERING | PUT_BACK
    assert state_without(steered, result) == before


@pytest.mark.parametrize("command", ["issue-to-pr", "self-heal"])
def test_allowed_paths_of_the_supervisors_are_proposed(steered: Repository, command: str) -> None:
    allow = [f"--allow={pattern}" for pattern in ("AGENTS.md", ".github", "*.json", "*/CLAUDE.md")]
    gate = ("--sandbox", "off", "--gate", "sh -c 'grep -q mine *.py'", "--json")
    start = ISSUE if command == "issue-to-pr" else (command,)
    result = steered.run(*start, *gate, *allow, agent=sh(STEERING))
    let_in = {change for change in PUT_BACK if change.endswith((".md", ".yml", ".json"))}
    found = proposed(steered, result)
    assert found & PUT_BACK == let_in and "M calc.py" in found
    assert {change[2:] for change in PUT_BACK - let_in} <= told(result, "put-back")


def test_folder_that_becomes_a_link_is_read_and_a_deleted_link_goes_on(
    repo: Repository, agent: Any
) -> None:
    repo.write("pkg/a.py", "A = 1\n")
    repo.write("lib/b.py", "B = 1\n")
    (repo.path / "old").symlink_to("lib")
    repo.commit("a folder and a link")
    links = "import os\nos.remove('pkg/a.py')\nos.rmdir('pkg')\nos.symlink('lib', 'pkg')\n"
    words = ("issue-to-pr", "issue.md", "--sandbox", "off", "--no-switch", "--json", "--gate")
    result = repo.run(*words, "true", agent=agent(links + "os.remove('old')"))
    assert result.status == 0 and result.report["files"] == ["old", "pkg", "pkg/a.py"], result.err
    again = repo.run(*words, "true", "--continue", agent=agent("open('new.py', 'w')")).report
    assert again["files"] == ["new.py", "old", "pkg", "pkg/a.py"]
    assert repo.tree(again["branch"]) == again["tree"]
