"""The page in the record: it says where a run ended, and holds no element that is not ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import CHEAP_GATE, Repository, Result

RED = shlex.join([sys.executable, "-S", "-c", "1/0"])
FLAKY = "import os; p = os.environ['TMPDIR'] + '/p'; old = os.path.exists(p); open(p, 'w'); 1 / old"
FLAKY = shlex.join([sys.executable, "-c", FLAKY])
ISSUE = ("issue-to-pr", "issue.md", "--json", "--sandbox", "off", "--no-baseline", "--gate")
HEAL = ("self-heal", "--json", "--sandbox", "off", "--gate")
WORK = "import os, pathlib, signal, time\nopen('calc.py', 'a').write('one = 1\\n')\n"
ENDED = WORK + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
ESCAPE = WORK + "open(f'{REAL}/.git/config', 'a').write('[core]\\nhooksPath = x\\n')\n"
ONCE = "open('once.py', 'w').write('one = 1\\n')\n"
CASES: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "proposed": ((*ISSUE, CHEAP_GATE), WORK, "Proposal", "good good good good good over"),
    "green": ((*HEAL, CHEAP_GATE), WORK, "Check", "over off off off off off"),
    "flaky": ((*HEAL, FLAKY), WORK, "Check", "bad off off off off kept"),
    "rejected": ((*ISSUE, RED), WORK, "Verdict", "good good good good bad kept"),
    "gave up": ((*HEAL, RED), WORK, "Verdict, attempt 2", "again good good good bad kept"),
    "idle later": ((*HEAL, RED), ONCE, "Change, attempt 2", "again good good bad off kept"),
    "red base": ((*ISSUE[:-2], "--gate", RED), WORK, "Verdict", "good good good good bad kept"),
    "idle": ((*ISSUE, CHEAP_GATE), "pass", "Change", "good good good bad off kept"),
    "failed": ((*ISSUE, CHEAP_GATE), "1 / 0", "Agent", "good good bad off off kept"),
    "interrupted": ((*ISSUE, CHEAP_GATE), ENDED, "Agent", "good good bad off off kept"),
    "rule broken": ((*ISSUE, CHEAP_GATE), ESCAPE, "Proposal", "good good good good good bad"),
}
TAGS = "html meta style title h1 h2 p ol ul li b small details summary pre code ins del span"
ATTRIBUTES = "charset class content http-equiv lang name open style"


class Page(HTMLParser):
    """The parts of a page: the names of elements and attributes, the text, and the boxes."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.path = Path(result.report["page"])
        self.source = self.path.read_text(encoding="utf-8")
        self.tags, self.names, self.text = set[str](), set[str](), ""
        self.feed(self.source)
        self.boxes = re.findall(r'<li class="(\w+)" style="--at: \d"><b>(.*?)</b>', self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", CASES)
def test_page_says_where_the_run_ended(repo: Repository, agent: Any, name: str) -> None:
    words, work, box, states = CASES[name]
    result = repo.run(*words, agent=agent(f"REAL = {str(repo.path)!r}\n{work}"))
    page, report = Page(result), result.report
    assert [name for state, name in page.boxes if state in ("over", "bad")] == [box], result.err
    assert [state for state, _ in page.boxes][-6:] == states.split()
    assert f"{report['outcome'].upper()} (exit {result.status}){report['message']}" in page.text
    assert ("The diff" in page.text) == bool(report["kept"] or report["branch"])
    assert re.search(r"<small>\d+\.\d s</small>", page.source)
    assert f"Record: {report['record']} (open page.html in a browser" in result.err


HOSTILE = r"""
evil = "</pre></code></details><script>alert(1)</script>"
test = "import calc\n\n\ndef test_it():\n    assert calc.x == '" + evil + "'  # \u202e\x1b[31m\n"
open("<img src=x onerror=alert(1)>.py", "w").write("x = 1  # " + "long " * 99 + "\n")
open("test_<b onclick=alert(1)>.py", "w").write(test)
open("calc.py", "a").write(f"x = {evil!r}\n")
print(evil, "\x1b]0;<script>\x07\x1b[2J&amp;", "wide" * 999)
"""


@pytest.fixture
def hostile(repo: Repository, agent: Any) -> Page:
    title = "<script>alert(1)</script> \" onload='x' &lt; \x1b[31m"
    repo.write("issue.md", f"# {title}\n\n</pre><img src=http://x.invalid>\n")
    return Page(repo.run(*ISSUE, "pytest -q", "--gate", f"{RED} '<i>'", agent=agent(HOSTILE)))


def test_hostile_text_is_only_text(hostile: Page) -> None:
    assert hostile.tags <= {*TAGS.split()} and hostile.names <= {*ATTRIBUTES.split()}
    for told in ("<script>alert(1)</script>", "<img src=x onerror", "onclick=", "\\u202e\\x1b[31m"):
        assert told in hostile.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]|url\(|@import", hostile.source)
    assert "default-src 'none'" in hostile.source


def test_secrets_are_masked_before_they_are_escaped(repo: Repository, agent: Any) -> None:
    secret = "k3y<&>'and-more-of-it"
    work = f"open('calc.py', 'a').write('# ' + {secret!r} * 20)\nprint({secret!r})\n1 / 0\n"
    page = Page(repo.run(*ISSUE, CHEAP_GATE, agent=agent(work), env={"MY_TOKEN": secret}))
    assert page.text.count("[withheld]") > 20 and "k3y" not in page.source


def test_long_diff_is_folded_and_cut(repo: Repository, agent: Any) -> None:
    work = "open('a.py', 'w').write('# <long>\\n' * 99_999)\nopen('b.bin', 'wb').write(bytes(9))\n"
    page = Page(repo.run(*ISSUE, CHEAP_GATE, agent=agent(work)))
    assert "all of it is in change.patch" in page.text and len(page.text) < 300_000
    assert "<details><summary>The diff" in page.source


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
WRAPPER = """<iframe src="PAGE" style="width: 360px; height: 640px; border: 0" onload="
    const page = this.contentDocument, style = this.contentWindow.getComputedStyle;
    document.title = [page.documentElement.scrollWidth, page.scripts.length,
        style(page.querySelector('ol .bad')).borderTopWidth].join()"></iframe>"""
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update --hide-scrollbars --dump-dom"


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_page_fits_a_phone(hostile: Page, tmp_path: Path) -> None:
    (tmp_path / "wrapper.html").write_text(WRAPPER.replace("PAGE", hostile.path.as_uri()))
    own = ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    argv = [BROWSER, *FLAGS.split(), *own, (tmp_path / "wrapper.html").as_uri()]
    done = subprocess.run(argv, capture_output=True, timeout=120)
    assert b"<title>360,0,5px</title>" in done.stdout
