"""The proposal: commit, text, and the commands that a person would run; hostile text in all of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import agent_runner
from conftest import CHEAP_GATE, Repository, isolate, small_app
from test_record import SCHEMA, TRIPLE, misfits


@pytest.mark.parametrize(
    ("address", "web"),
    [
        ("https://github.com/o/r.git", "https://github.com/o/r"),
        ("https://github.com/o/r/", "https://github.com/o/r"),
        ("https://name:t0ken@github.com/o/r", "https://github.com/o/r"),
        ("git@github.com:o/r.git", "https://github.com/o/r"),
        ("github.com:o/r", "https://github.com/o/r"),
        ("ssh://git@github.com/o/r.git", "https://github.com/o/r"),
        ("ssh://git@ssh.github.com:443/o/r.git", "https://github.com/o/r"),
        ("ssh://git@altssh.gitlab.com:443/g/r.git", "https://gitlab.com/g/r"),
        ("git+ssh://git@forge.example:2222/g/s/t/r.git", "https://forge.example/g/s/t/r"),
        ("https://forge.example:8443/g/s/r.git", "https://forge.example:8443/g/s/r"),
        ("http://localhost:3000/o/r.git", "http://localhost:3000/o/r"),
        ("git://git.example/r.git", "https://git.example/r"),
        ("git@codeberg.org:o/r.git", "https://codeberg.org/o/r"),
        ("git@host.example:/srv/git/r.git", ""),
        ("alias:o/r.git", ""),
        ("/srv/git/r.git", ""),
        ("../r.git", ""),
        ("file:///srv/r.git", ""),
        (r"C:\r.git", ""),
        ("C:/r.git", ""),
        ("", ""),
    ],
)
def test_web_address_is_found_in_every_form_of_a_remotes(address: str, web: str) -> None:
    assert agent_runner.web_address(address) == web


TITLE = 'Say "it\'s" & done'
QUOTED = "Say%20%22it%27s%22%20%26%20done"


class Layout(NamedTuple):
    """A repository's remotes and branches, and the one command after the push that is right for it."""

    remotes: dict[str, str]
    push: str
    then: list[str]  # words of the command, or an address to open
    config: dict[str, str] = {}  # noqa: RUF012
    refs: tuple[str, ...] = ()  # remote-tracking branches that are known
    default: str = ""  # the remote's own default branch
    branch: str = "main"
    base: str | None = None
    files: tuple[str, ...] = ()


def web(form: str) -> list[str]:
    return ["python3", "-m", "webbrowser", form]


GITHUB, FORK = "https://github.com/org/r.git", "git@github.com:ada/r.git"
GITLAB, CODEBERG = "ssh://git@gitlab.example:2222/g/s/r.git", "git@codeberg.org:org/r.git"
MERGE = "-/merge_requests/new?merge_request%5Bsource_branch%5D=agent%2Fx&merge_request%5Btarget_branch%5D=main"
MERGE += f"&merge_request%5Btitle%5D=Draft%3A%20{QUOTED}"
FORM = f"agent/x?expand=1&title={QUOTED}"
PUSH = "git push -u origin agent/x"
TO_FORK = "git push -u fork agent/x"
LAYOUTS = {
    "github": Layout({"origin": GITHUB}, PUSH, web(f"https://github.com/org/r/compare/main...{FORM}")),
    "gitlab": Layout({"origin": GITLAB}, PUSH, web(f"https://gitlab.example/g/s/r/{MERGE}")),
    "codeberg": Layout({"origin": CODEBERG}, PUSH, web(f"https://codeberg.org/org/r/compare/main...{FORM}")),
    "unknown forge": Layout({"origin": "https://git.example/o/r"}, PUSH, web("https://git.example/o/r")),
    "forge told by its files": Layout(
        {"origin": "https://git.example/o/r"}, PUSH, web(f"https://git.example/o/r/{MERGE}"), files=(".gitlab-ci.yml",)
    ),
    "no forge": Layout({"origin": "/srv/git/r.git"}, PUSH, []),
    "one remote of another name": Layout({"it's": "/srv/r.git"}, "git push -u 'it'\"'\"'s' agent/x", []),
    "fork and upstream": Layout(
        {"origin": FORK, "upstream": GITHUB}, PUSH, web(f"https://github.com/org/r/compare/main...ada:{FORM}")
    ),
    "push default": Layout(
        {"origin": GITHUB, "fork": FORK},
        TO_FORK,
        web(f"https://github.com/org/r/compare/main...ada:{FORM}"),
        config={"remote.pushDefault": "fork", "branch.main.remote": "origin"},
    ),
    "push remote of the branch": Layout(
        {"origin": GITHUB, "fork": FORK, "other": "/srv/r.git"},
        TO_FORK,
        web(f"https://github.com/org/r/compare/main...ada:{FORM}"),
        config={"remote.pushDefault": "other", "branch.main.pushRemote": "fork", "branch.main.remote": "origin"},
    ),
    "fork at gitlab": Layout(
        {"origin": "git@gitlab.com:ada/r.git", "upstream": "git@gitlab.com:g/s/r.git"},
        PUSH,
        web(f"https://gitlab.com/ada/r/{MERGE}"),
    ),
    "upstream on another host": Layout(
        {"origin": CODEBERG, "upstream": GITHUB}, PUSH, web(f"https://codeberg.org/org/r/compare/main...{FORM}")
    ),
    "push address of its own": Layout(
        {"origin": "https://git.example/o/r"},
        PUSH,
        web(f"https://codeberg.org/o/r/compare/main...{FORM}"),
        config={"remote.origin.pushurl": "git@codeberg.org:o/r.git"},
    ),
    "shorthand address": Layout(
        {"origin": "gh:org/r"},
        PUSH,
        web(f"https://github.com/org/r/compare/main...{FORM}"),
        config={"url.https://github.com/.insteadOf": "gh:"},
    ),
    "local branch": Layout(
        {"origin": GITHUB},
        PUSH,
        web(f"https://github.com/org/r/compare/trunk...{FORM}"),
        refs=("origin/trunk", "origin/other"),
        default="trunk",
        branch="mine",
    ),
    "branch that the remote has": Layout(
        {"origin": GITHUB},
        PUSH,
        web(f"https://github.com/org/r/compare/v1%232...{FORM}"),
        refs=("origin/main", "origin/v1#2"),
        branch="v1#2",
    ),
    "tracked under another name": Layout(
        {"origin": GITHUB},
        PUSH,
        web(f"https://github.com/org/r/compare/release/1...{FORM}"),
        refs=("origin/main", "origin/release/1"),
        branch="mine",
        config={"branch.mine.remote": "origin", "branch.mine.merge": "refs/heads/release/1"},
    ),
    "base that was asked for": Layout(
        {"origin": GITHUB},
        PUSH,
        web(f"https://github.com/org/r/compare/release...{FORM}"),
        refs=("origin/main", "origin/release"),
        base="origin/release",
    ),
    "on a proposal": Layout(
        {"origin": GITHUB},
        PUSH,
        web(f"https://github.com/org/r/compare/master...{FORM}"),
        refs=("origin/master", "origin/agent/old"),
        branch="agent/old",
    ),
}


def steps_of(layout: Layout, repo: Repository, body: Path) -> list[tuple[str, str]]:
    """The printed commands for a proposal `agent/x` in a repository like this."""
    for name in layout.files:
        repo.write(name, "")
        repo.commit()
    for name, address in layout.remotes.items():
        repo.git("config", f"remote.{name}.url", address)
    for key, value in layout.config.items():
        repo.git("config", key, value)
    for ref in layout.refs:
        repo.git("update-ref", f"refs/remotes/{ref}", "HEAD")
    if layout.default:
        repo.git("symbolic-ref", "refs/remotes/origin/HEAD", f"refs/remotes/origin/{layout.default}")
    repo.git("checkout", "-q", "-B", layout.branch)
    settings = agent_runner.Settings("issue-to-pr", base=layout.base)
    run = agent_runner.Run(settings, agent_runner.find_repo(repo.path), agent_runner.Console())
    run.issue = agent_runner.Issue(TITLE, TITLE, "x", 0)
    run.forge = agent_runner.find_forge(run.repo)
    return agent_runner.proposal_commands(run, "agent/x", body)


@pytest.mark.parametrize("name", LAYOUTS)
def test_commands_fit_the_remote(name: str, repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(shutil.which("git") or ""))  # no forge's own program
    layout = LAYOUTS[name]
    steps = [command for _, command in steps_of(layout, repo, Path("pr.md"))]
    assert steps[0] == layout.push
    assert [shlex.split(step) for step in steps[1:]] == ([layout.then] if layout.then else [])


PROGRAMS = {
    "github": ["gh", "pr", "create", "--draft", "--repo", "github.com/org/r", "--head", "agent/x", "--base", "main"],
    "gitlab": [
        "glab",
        "mr",
        "create",
        "--draft",
        "--repo",
        "https://gitlab.example/g/s/r",
        "--source-branch",
        "agent/x",
    ],
    "codeberg": ["tea", "pr", "create", "--repo", "org/r", "--head", "agent/x", "--base", "main", "--title"],
    "fork and upstream": ["gh", "pr", "create", "--draft", "--repo", "github.com/org/r", "--head", "ada:agent/x"],
    "fork at gitlab": ["glab", "mr", "create", "--draft", "--repo", "https://gitlab.com/g/s/r", "--head", "ada/r"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_forges_own_program_gets_a_draft_with_title_and_text_as_they_are(
    name: str, repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, body = '`x` "quoted" $(touch /tmp/no) it\'s\n\n| a |\n', tmp_path / "it's a record" / "pr.md"
    body.parent.mkdir()
    body.write_text(text, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    for program in ("gh", "glab", "tea"):
        script = tmp_path / "bin" / program
        script.write_text(f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(['{program}', *sys.argv[1:]]))\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"])))
    step, command = steps_of(LAYOUTS[name], repo, body)[-1]
    assert step == "open a draft"
    words = json.loads(subprocess.run(["sh", "-ec", command], capture_output=True, check=True).stdout)
    assert words[: len(PROGRAMS[name])] == PROGRAMS[name]
    draft = {"gh": TITLE, "glab": TITLE, "tea": f"WIP: {TITLE}"}[words[0]]
    assert words[words.index("--title") + 1] == draft
    told = words[words.index("--body-file" if words[0] == "gh" else "--description") + 1]
    assert (Path(told).read_text(encoding="utf-8") if words[0] == "gh" else told + "\n") == text


def test_without_a_remote_the_commands_tell_how_to_add_one(repo: Repository) -> None:
    steps = steps_of(Layout({}, "", []), repo, Path("pr.md"))
    assert [command for _, command in steps] == ["git remote add origin ADDRESS", PUSH]


@pytest.mark.parametrize(
    ("text", "title", "reference"),
    [
        ("# Crash\n\nSee https://github.com/o/r/issues/12 for more.\n", "Crash", "https://github.com/o/r/issues/12"),
        (
            "# Crash\n\nhttps://gitlab.example:8443/g/s/r/-/issues/3\n",
            "Crash",
            "https://gitlab.example:8443/g/s/r/-/issues/3",
        ),
        ("# Crash (#12)\n\nIt crashes.\n", "Crash (#12)", "#12"),
        ("title:\tCrash\nstate:\tOPEN\nnumber:\t12\n--\n# Steps\n\nRun it.\n", "Crash", "#12"),
        ("title:\tCrash\nstate:\topen\nlabels:\t\n--\nRun it.\n", "Crash", ""),
        ("# #12 Crash\n", "#12 Crash", "#12"),
        ("# Crash that fixes #7, as in\n\nnumber: 7\n", "Crash that fixes #7, as in", ""),
    ],
)
def test_text_refers_to_the_issues_own_number_or_address(tmp_path: Path, text: str, title: str, reference: str) -> None:
    file = tmp_path / "issue.md"
    file.write_text(text, encoding="utf-8")
    issue = agent_runner.read_issue(str(file))
    assert (issue.title, issue.reference) == (title, reference)


@pytest.mark.parametrize(
    "text",
    [
        "@everyone", "a @team/core", "Fixes #1", "closes o/r#12", "resolve GH-3", "gh-3", "see !4",
        "Fixes https://github.com/o/r/issues/1", "Closes: http://gitlab.example/g/r/-/issues/2",
        "[skip ci] x", "x [ci skip]", "[No CI]", "[skip-ci]", "[skip actions]",
    ],
)  # fmt: skip
def test_nothing_in_a_commit_message_pings_closes_or_skips(text: str) -> None:
    done = agent_runner.harmless(text)
    assert not re.search(r"@\w|#\d|\bgh-\d|!\d|://\S+/\d|\[(skip|ci|no)", done, re.IGNORECASE)


def test_ordinary_text_of_a_commit_message_stays_as_it_is() -> None:
    text = "Add [notes] for @ and #, https://example.org/a; nothing else!"
    assert agent_runner.harmless(text) == text


# A repository in which every name and text is hostile.

HOSTILE = "Fix ``it`` <img src=x onerror=alert(1)> @everyone Fixes #1 [skip ci] | **b** \x1b[31m \u202e $(id) 'q' \"q\""
NAMES = ["-rf", 'it\'s "q" $(id).txt', "a|b`c``d`.md", "a\\|b.md", "<b>@all Fixes #2</b>.txt", "@team/tick`"]
HOSTILE_AGENT = f"""
import pathlib
for name in {NAMES!r}:
    path = pathlib.Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("x\\n")
pathlib.Path("test_odd.py").write_text('''import pytest


@pytest.mark.parametrize("x", ["`a` | <b>x</b> @all Fixes #3 ::error::\\\\n", "--flag"])
def test_odd(x):
    assert x
''')
"""
PLACE = "it's here"
BRANCH = 'it\'s-"quoted"&|`-#1'


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, Any, Repository]:
    """A proposal made and pushed, as printed, in a repository where everything is hostile: app, result, remote."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder / "home")
        app, remote = small_app(folder / 'it\'s "an" app'), Repository(folder / "re mote's.git")
        app.write(f"{PLACE}/issue.md", f"# {HOSTILE}\n\n@everyone ``` </details>\n")
        app.commit()
        app.git("switch", "-q", "-c", BRANCH)
        subprocess.run(["git", "init", "-q", "--bare", str(remote.path)], check=True)
        app.git("remote", "add", "it's|origin", str(remote.path))
        agent = folder / "agent.py"
        agent.write_text(HOSTILE_AGENT, encoding="utf-8")
        words = ("issue-to-pr", "issue.md", "--json", "--gate", "pytest -q", "--gate", f"{CHEAP_GATE} '`|`'")
        result = app.run(*words, agent=shlex.join([sys.executable, "-S", str(agent)]), cwd=PLACE)
    assert result.status == 0, result.err
    return app, result, remote


def pull_request(result: Any) -> str:
    return Path(result.report["proposal"]["body_file"]).read_text(encoding="utf-8")


def outside_code(markdown: str) -> str:
    """What of a Markdown text is no code: what a forge would render, link or act on (CommonMark 4.5, 6.1)."""
    text = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "BLOCK", markdown, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", line) for line in text.split("\n"))


def test_hostile_text_stays_in_its_place_in_the_pull_requests_text(hostile: tuple[Repository, Any, Repository]) -> None:
    text = pull_request(hostile[1])
    words = set(re.findall(r"[^\W\d_]{2,}", re.sub(r"`[0-9a-f]{40}`", "", outside_code(text))))
    ours = """No proposal What was asked Look at this first Evidence check result time command passed Attempts Guard
    withheld refused by Git the kernel Judged tree as commit on Files file change lines added changed Check it yourself
    The third prints that judged CODE BLOCK fails cannot run without and passes with
    Nothing stood out so too it proves nothing"""
    assert words <= set(ours.split()), words - set(ours.split())
    assert not re.search(r"[<>@]|#\d|!\d", outside_code(text))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert not re.search(r"(fixes|closes)\W+#\d", text, re.IGNORECASE)


def test_hostile_names_leave_every_table_whole(hostile: tuple[Repository, Any, Repository]) -> None:
    rows = [line for line in pull_request(hostile[1]).split("\n") if line.startswith("|")]
    cells = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
    assert len(rows) == 2 + 3 + 2 + len(NAMES) + 1
    assert cells == [6] * 5 + [5] * (2 + len(NAMES) + 1)
    for name in ("-rf", 'it\'s "q" $(id).txt', "@team/tick`", r"a\|b`c``d`.md"):
        assert any(f"{name} " in row or f"{name}`" in row for row in rows), name


def test_hostile_title_makes_a_harmless_commit_message(hostile: tuple[Repository, Any, Repository]) -> None:
    app, result, _ = hostile
    message = app.git("log", "-1", "--format=%B", result.report["branch"])
    subject, blank, *body = message.split("\n")
    assert subject == result.report["proposal"]["title"] and blank == "" and body
    assert subject.startswith("Fix ``it`` <img src=x onerror=alert(1)> (at)everyone Fixes no. 1")
    assert not re.search(r"@\w|#\d|\[skip|[\x00-\x09\x0b-\x1f\u202e]", message)
    assert app.git("log", "-1", "--format=%an <%ae> %cn", result.report["branch"]) == "Ada <ada@example.invalid> Ada"
    assert app.git("rev-parse", f"{result.report['branch']}^") == result.report["base"]


def test_hostile_names_make_a_report_that_fits_the_schema(hostile: tuple[Repository, Any, Repository]) -> None:
    assert list(misfits(hostile[1].report, SCHEMA)) == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", hostile[1].err)


def test_printed_commands_work_in_a_hostile_repository(hostile: tuple[Repository, Any, Repository]) -> None:
    app, result, remote = hostile
    printed = dict(re.findall(r"^  ([a-z ]+): +(git .*)$", result.err, re.MULTILINE))
    for step in ("look at it", "push it", "drop it"):
        subprocess.run(["sh", "-ec", printed[step]], cwd=app.path / PLACE, check=True, capture_output=True)
    assert remote.tree(result.report["branch"]) == result.report["tree"]
    assert app.git("branch", "--show-current") == BRANCH
    assert app.git("for-each-ref", "refs/heads/agent") == ""


def test_reviewer_can_check_it_as_the_text_says(hostile: tuple[Repository, Any, Repository], tmp_path: Path) -> None:
    app, result, remote = hostile
    subprocess.run(
        ["git", "push", "-q", "it's|origin", f"{result.report['commit']}:refs/heads/x"], cwd=app.path, check=True
    )
    subprocess.run(["git", "clone", "-q", str(remote.path), str(tmp_path / "clone")], check=True, capture_output=True)
    block = re.search(r"## Check it yourself\n.*?```sh\n(.*?)```", pull_request(result), re.DOTALL)
    assert block
    done = subprocess.run(["sh", "-ec", block[1]], cwd=tmp_path / "clone", capture_output=True, check=False)
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert out.split("\n")[0] == result.report["tree"]
    assert "+++ b/it's here/a|b`c``d`.md" in out and "2 passed" in out


def test_names_that_no_one_can_check_out_are_rejected_and_told_on_one_line(repo: Repository, agent: Any) -> None:
    bad = agent("import os\nfor name in (b'new\\nline', b'\\xff', b'\\x1b[2Jx'):\n    open(name, 'w').close()\n")
    result = repo.run("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", CHEAP_GATE, agent=bad)
    assert result.status == 1, result.err
    assert list(misfits(result.report, SCHEMA)) == []
    json.dumps(result.report, ensure_ascii=False).encode()  # no half of a character
    assert len([finding for finding in result.report["findings"] if finding["kind"] == "path"]) == 3
    assert "\x1b" not in result.err
    text = (Path(result.report["record"]) / "pr.md").read_text(encoding="utf-8")
    assert text.startswith("**No proposal:** rejected (exit 1). `")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_new_test_that_the_gate_never_ran_is_told(repo: Repository, agent: Any) -> None:
    repo.write("pytest.ini", "[pytest]\ntestpaths = test_calc.py\n")
    repo.commit()
    result = repo.run("issue-to-pr", "issue.md", "--json", "--no-baseline", "--gate", "pytest -q", agent=agent(TRIPLE))
    assert [(finding["kind"], finding["path"]) for finding in result.report["findings"]] == [
        ("not-run", "test_triple.py")
    ]
    assert "`test_triple.py` `a new test file that no gate command ran" in pull_request(result)


UNRULY = """
import pathlib
real = pathlib.Path(REAL)
git = real / ".git"
(git / "HEAD").write_text("ref: refs/heads/it's-mine\\n")
(git / "refs/heads/it's-mine").write_text((git / "refs/heads/main").read_text())
(git / "refs/heads/link").write_text("ref: refs/heads/main\\n")
(git / "refs/heads/gone").unlink()
(git / "refs/heads/moved").write_text((git / "refs/heads/main").read_text())
(git / "config").write_text((git / "config").read_text() + "[alias]\\n\\tx = !id\\n")
(git / "hooks/pre-push").unlink()
(git / "hooks/it's mine").write_text("#!/bin/sh\\n")
(git / "refs/heads/bro ken").write_text("nonsense")
"""


def test_each_printed_undo_puts_one_thing_back(repo: Repository, agent: Any) -> None:
    repo.git("tag", "first")
    for branch in ("gone", "moved"):
        repo.git("branch", branch)
    repo.write(".git/hooks/pre-push", "#!/bin/sh\nexit 0\n", mode=0o755)
    repo.commit("second")
    before = repo.state()
    unruly = agent(f"REAL = {str(repo.path)!r}\n{UNRULY}")
    words = ("issue-to-pr", "issue.md", "--json", "--no-baseline", "--sandbox", "off", "--gate", CHEAP_GATE)
    result = repo.run(*words, agent=unruly)
    assert result.status == 5, result.err
    undo = [moved["undo"] for moved in result.report["moved"]]
    assert len(undo) == 9, undo
    for command in undo:
        assert f"\n    {command}\n" in result.err
        subprocess.run(["sh", "-ec", command], cwd=repo.path, check=True)
    assert repo.state() == before
    assert os.access(repo.path / ".git/hooks/pre-push", os.X_OK)


def test_work_taken_over_twice_gets_a_second_name(repo: Repository, agent: Any) -> None:
    wrong = agent("import pathlib\npathlib.Path('calc.py').write_text('x')\n")
    words = ("issue-to-pr", "issue.md", "--no-baseline", "--gate", f"{shlex.quote(sys.executable)} -S -c 1/0")
    for name in ("my-issue", "my-issue-2"):
        printed = re.search(r"take it over: +(git .*)", repo.run(*words, agent=wrong).out)
        assert printed
        subprocess.run(["sh", "-ec", printed[1]], cwd=repo.path, check=True, capture_output=True)
        assert repo.git("branch", "--show-current") == name
        repo.git("switch", "-q", "main")
