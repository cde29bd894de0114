"""The two commands, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Repository

FIX = 'import pathlib; pathlib.Path("calc.py").write_text("def double(x):\\n    return x * 2\\n")'


def test_course_sequence_leaves_what_is_not_committed_untouched(repo: Repository) -> None:
    repo.write("agent_runner.py", (Path(__file__).parent.parent / "agent_runner.py").read_text(encoding="utf-8"))
    before = repo.state()
    assert repo.run("issue-to-pr", "issue.md", "--simulate", "bad").status == 1
    assert repo.state() == before


def test_self_heal_proposes_exactly_the_judged_tree(broken: Repository, agent: Any) -> None:
    result = broken.run("self-heal", "--json", agent=agent(FIX))
    assert result.status == 0, result.err
    assert broken.tree(result.report["branch"]) == result.report["tree"]
