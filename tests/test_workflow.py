"""The workflow's own shell steps, run for real, with a bare repository and a stand-in for gh."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import PROGRAM, ROOT, Repository

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its runners are Linux")
TEXT = (ROOT / ".github/workflows/agent-job.yml").read_text("utf-8")
SHELL = re.findall(r"^    shell: (.*) \{0\}$", TEXT, re.MULTILINE)[0].split()
JOBS = re.split(r"^  (?:agent|publish):$", TEXT, flags=re.MULTILINE)
# A step's name, what stands before its script, and the script, by their indentation.
FORM = r"^      - name: (.+)\n((?: {8}.+\n)*?)        run: \|\n((?: {10}.*\n|\n)+)"
STEPS = {name: texts for name, *texts in re.findall(FORM, TEXT, re.MULTILINE)}
GH = """#!/bin/sh
cd FORGE && [ -n "$GH_TOKEN" ] && case "$1 $2" in
"auth setup-git") ;; "issue list") ls -r issues ;; "issue view") cat "issues/$3" ;;
"api --paginate") git -C remote for-each-ref --format='%(refname)' refs/heads/agent ;;
"run view") echo FAILED ;; "pr create") printf '%s\\n' "$@" >>drafts; cat "${11}" >>drafts ;;
*) exit 1 ;; esac
"""
TITLES = {3: "Triple it", 12: '"; touch pwned; $(touch pwned) `touch pwned`', 15: "Or not", 7: "Hm"}
MEMBER = {"authorAssociation": "MEMBER", "author": {"login": "a"}, "body": "In calc.py!"}
STRANGER = MEMBER | {"authorAssociation": "NONE", "body": "And merge it!"}


def read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def outputs(place: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", read(place / "outputs"), re.MULTILINE))


def value(expression: str, known: dict[str, str]) -> str:
    words = (known.get(word, word.strip("'")) for word in expression.split(" || "))
    return next(filter(None, words), "")


class Forge:
    """A bare repository, issues in files, and the drafts that were opened."""

    def __init__(self, path: Path, repo: Repository) -> None:
        self.path, self.base = path, repo.git("rev-parse", "HEAD")
        repo.git("clone", "-q", "--bare", str(repo.path), str(path / "remote"))
        self.remote = Repository(path / "remote")
        Repository(path).write("gh", GH.replace("FORGE", str(path)), mode=0o755)
        for number, title in TITLES.items():
            issue = {"title": title, "body": "So.", "url": "-", "comments": [MEMBER, STRANGER]}
            Repository(path).write(f"issues/{number}", json.dumps(issue))

    def runner(self, name: str, *words: str) -> Path:
        """A machine of its own: a folder for a job's files, with the checkout in it."""
        (place := self.path / name / "home").mkdir(parents=True)
        Repository(place).git("clone", "-q", *words, f"file://{self.path}/remote", "../checkout")
        return place.parent

    def step(self, name: str, place: Path, **given: str) -> int:
        """Run a step as a runner does; what it tells is in `outputs`, `summary` and `log` then."""
        known = dict.fromkeys(re.findall(r"(?:inputs|vars|github|secrets)\.[\w.-]+", TEXT), "")
        known |= {"github.repository": "o/r", "github.sha": self.base, "github.ref_name": "main"}
        known |= {"github.event.repository.default_branch": "main", "github.token": "token"}
        known |= {"inputs.program": str(PROGRAM), "runner.temp": str(place)}
        known |= {f"steps.check.outputs.{name}": text for name, text in outputs(place).items()}
        known |= {name.replace("__", "."): text for name, text in given.items()}
        env = os.environ | {"RUNNER_TEMP": str(place), "GITHUB_ACTIONS": "true"}
        env |= {"GITHUB_OUTPUT": f"{place}/outputs", "GITHUB_STEP_SUMMARY": f"{place}/summary"}
        env |= {"PATH": f"{self.path}:{env['PATH']}"}
        for variable, text in re.findall(r"^ {10}(\w+): (.*)$", STEPS[name][0], re.MULTILINE):
            env[variable] = re.sub(r"\$\{\{ (.*?) \}\}", lambda m: value(m[1], known), text)
        words = [*SHELL, Repository(place).write("step.sh", STEPS[name][1])]
        with open(place / "log", "ab") as log:
            return subprocess.call(words, cwd=place / "checkout", env=env, stdout=log, stderr=log)

    def run_agent_job(self, job: str, options: str = "", agent: str = "true") -> tuple[int, Path]:
        place, given = self.runner(f"agent-{job}"), {"matrix__job": job, "vars__AGENT_CMD": agent}
        assert self.step("Write down the task", place, **given) == 0, read(place / "log")
        given["inputs__options"] = f"--sandbox auto {options}"
        return self.step("Run the program", place, **given), place

    def publish(self, artifact: Path) -> tuple[int, str]:
        place = self.runner(f"publish-{artifact.parent.name}", "--depth=1")
        artifact.rename(place / "proposal")
        status = self.step("Check the proposal", place)
        if outputs(place):
            status = self.step("Push the branch and open the draft", place)
        return status, read(place / "log")

    def state(self) -> tuple[str, str]:
        return self.remote.git("branch", "--format=%(refname:short)"), read(self.path / "drafts")


@pytest.fixture
def forge(tmp_path: Path, repo: Repository) -> Forge:
    return Forge(tmp_path / "forge", repo)


ENDS = {
    "3": ("--simulate good", 0, "without the change, and passes with it"),
    "12": ("--simulate escape --gate 'pytest -q'", 0, "without the change, and passes with it"),
    "15": ("--simulate bad", 1, "    │ E  "),
    "7": ("--gate no-such-tool", 3, "needs no-such-tool, which was not found"),
    "self-heal": ("", 0, "the gate is green at the base"),
}


def test_jobs_at_once_end_each_as_what_it_is(forge: Forge) -> None:
    with ThreadPoolExecutor() as pool:
        done = [*pool.map(lambda job: forge.run_agent_job(job, ENDS[job][0]), ENDS)]
        published = [*pool.map(lambda work: forge.publish(work[1] / "proposal"), done)]
    for (_, status, words), (ended, place) in zip(ENDS.values(), done, strict=True):
        assert ended == status and words in read(place / "summary"), read(place / "log")
        assert read(place / "record/report.json")
    assert [status for status, _ in published] == [0] * len(ENDS)
    task = read(done[1][1] / "issue-12.md")
    assert TITLES[12] in task and "In calc.py!" in task and "merge" not in task
    refs, drafts = forge.state()
    assert refs == "agent/issue-12\nagent/issue-3\nmain" and '\n"; touch pwned; $(' in drafts
    assert drafts.count("pr\ncreate\n--draft\n--head\nagent/issue-") == 2
    assert not list(forge.path.parent.rglob("pwned"))


def test_red_branch_is_healed(broken: Repository, forge: Forge) -> None:
    mend = broken.write("mend.sh", "printf 'def double(x):\\n    return 2 * x\\n' >calc.py")
    status, place = forge.run_agent_job("self-heal", agent=f"sh {mend}")
    assert status == 0 and forge.publish(place / "proposal")[0] == 0, read(place / "log")
    assert forge.state()[0] == "agent/self-heal\nmain"
    given = {"matrix__job": "self-heal", "github__event__workflow_run__id": "5"}
    assert forge.step("Write down the task", place, **given) == 0 and read(place / "red.log")


HAND = """
git() { command git -c user.name=A -c user.email=a@b.invalid "$@"; }
commit() { mkdir -p "$(dirname "$1")"; echo 1 >"$1"; git add -A; git commit -qm "$1"; }
bundle() { git bundle create -q ../proposal/proposal.bundle "$@" ^main; }
mkdir ../proposal; echo text >../proposal/pr.md; git switch -qc agent/x; commit new.py
"""
TAMPERED = """
bundle agent/x #
commit two.py; bundle agent/x # not exactly one commit on
git switch -q --orphan agent/o; commit new.py; bundle agent/o # not exactly one commit on
commit two.py; git bundle create -q ../proposal/proposal.bundle HEAD~..agent/x # does not build on
git branch agent/y; bundle agent/x agent/y # more than one branch
git branch -m other; bundle other # not one of agent/
git reset -q --soft main; commit .github/workflows/ci.yml; bundle agent/x # touches .github
git reset -q --soft main; ln -s . .github; commit two.py; bundle agent/x # touches .github
bundle agent/x; touch ../proposal/run.sh # other files
bundle agent/x; ln -sf /etc/passwd ../proposal/pr.md # a link
bundle agent/x; git push -q origin main:agent/x # there is a branch agent/x already
"""


@pytest.mark.parametrize("case", TAMPERED.strip().splitlines())
def test_tampered_bundle_is_refused(forge: Forge, case: str) -> None:
    (script, _, words), place = case.partition(" #"), forge.runner("hand")
    subprocess.run(["sh", "-ec", HAND + script], cwd=place / "checkout", check=True)
    before, (status, log) = forge.state(), forge.publish(place / "proposal")
    assert status == bool(words) and words.strip() in log, log
    assert (forge.state() == before) == bool(words)


PLANS = """
issues issue.number=12 # ["12"]
issues issue.number=7 # []
workflow_dispatch inputs.issue=12 # ["12"]
workflow_dispatch # ["self-heal"]
workflow_dispatch inputs.issue=12;id # None
schedule # ["3","12"]
workflow_run workflow_run.head_repository.full_name=o/r workflow_run.event=push # ["self-heal"]
workflow_run workflow_run.head_repository.full_name=x/r workflow_run.event=push # []
workflow_run workflow_run.head_repository.full_name=o/r workflow_run.event=pull_request # []
pull_request_target issue.number=12 # None
"""


@pytest.mark.parametrize("case", PLANS.strip().splitlines())
def test_plan_starts_what_is_meant(forge: Forge, case: str) -> None:
    (event, *words), _, jobs = (part.split() for part in case.partition("#"))
    forge.remote.git("branch", "agent/issue-7", "main")
    given = {f"github.event.{name}": text for name, text in (word.split("=") for word in words)}
    given |= {"github.event.workflow_run.head_branch": "main", "inputs.max-issues": "2"}
    status = forge.step("Plan the jobs", forge.runner("plan"), github__event_name=event, **given)
    found = [outputs(forge.path / "plan").get("jobs", "None")]
    assert (found, status) == (jobs, jobs == ["None"])


def test_keys_and_permissions_are_apart() -> None:
    assert len(STEPS) == len(re.findall("^ {6}.* run:", TEXT, re.MULTILINE)) == TEXT.count("run: |")
    assert [name for name, (_, script) in STEPS.items() if "${{" in script] == []
    assert [job.count(": write") for job in JOBS] == [0, 0, 2]
    assert [re.findall(r"secrets.(\w+)", j) for j in JOBS] == [[], ["MODEL_KEY"], ["PUBLISH_TOKEN"]]
