"""README.md and docs/*.md say what is true: tables, links, commands, paths, code samples."""

import re
import runpy
import shlex
import signal
import subprocess
import sys

import pytest

from compression.dry_run import check
from compression.runtime import ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATED = [ROOT / "README.md", ROOT / "docs" / "README.md"]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Shell scripts whose flags are those of a Python script.
SAME_FLAGS = {"run_gqa_aware_pruning.sh": "gqa_aware_pruning.py"}


def prose(page):
    """A page without its code."""
    return FENCE.sub("", page.read_text())


def blocks(page, language):
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def written_commands():
    """(page, script, flags) of every command in code blocks and code spans."""
    scripts = {path.name: path for path in ROOT.glob("*.py")}
    benchmarks = [path for path in ROOT.glob("benchmarks/*.py") if "run_script(" in path.read_text()]
    scripts |= {f"benchmarks/{path.name}": path for path in benchmarks}
    scripts |= {shell: scripts[script] for shell, script in SAME_FLAGS.items()}
    for page in PAGES:
        code = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        code += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(page))]
        for line in code:
            # What is in brackets may be given too; what is left out is not said.
            words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)
            for place, word in enumerate(words):
                if word in scripts:
                    yield page.name, scripts[word], tuple(words[place + 1 :])
                    break


COMMANDS = sorted(set(written_commands()), key=str)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_as_generated(page):
    assert page.read_text() == GENERATE["generated"](page.read_text()), "run: python docs/generate.py"


def test_every_table_has_its_place():
    text = "".join(page.read_text() for page in PAGES)
    for name in GENERATE["TABLES"]:
        assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", prose(page))
    for link in links:
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page):
    folders = "compression|benchmarks|tests|docs"
    paths = re.findall(rf"`(?:python )?((?:{folders})/[\w/.]+)", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.fixture
def as_a_script(tmp_path, monkeypatch):
    """What a dry run changes is put back; the files that commands name are there, and what a benchmark needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "alpaca.json").write_text("[]")
    (tmp_path / "others.txt").touch()
    (tmp_path / "results" / "own_text").mkdir(parents=True)
    (tmp_path / "results" / "own_text" / "text.txt").touch()
    (tmp_path / "torch_pruning.py").touch()
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join([command[1].name, *command[2]]))
def test_commands_parse(command, as_a_script, capsys):
    page, script, flags = command
    assert check(str(script), *flags) == 0, f"{page}: {capsys.readouterr().err}"


def test_commands_are_found_and_wrong_ones_are_refused(as_a_script):
    found = {script.name for _, script, _ in COMMANDS}
    assert found >= {path.name for path in ROOT.glob("*.py")}
    assert check(str(ROOT / "post_training.py"), "--no_such_flag") != 0


def test_the_tree_names_what_is_there():
    tree = next(code for kind, code in FENCE.findall(PAGES[0].read_text()) if kind == "")
    named = [line.split()[0] for line in tree.splitlines()]
    assert [name for name in named if not (ROOT / name).exists()] == []
    scripts = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".sh")}
    assert scripts == {name for name in named if "/" not in name}


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.parent.name)
def test_the_chinese_page_says_what_the_english_one_does(page):
    pages = page, page.with_name("README.zh-CN.md")

    def said(pattern, text):
        return re.findall(pattern, text, re.MULTILINE)

    def commands(page):
        code = blocks(page, "bash") + blocks(page, "python")
        return [line.split("#")[0].rstrip() for block in code for line in block.splitlines()]

    english, chinese = map(commands, pages)
    assert english == chinese
    trees = [[line.split()[0] for tree in blocks(page, "") for line in tree.splitlines()] for page in pages]
    assert trees[0] == trees[1]
    english, chinese = map(prose, pages)
    for pattern in (r"`([^`]+)`", r"\]\((?!(?:docs/)?README)([^)]+)\)"):
        spans = [sorted(" ".join(span.split()) for span in said(pattern, text)) for text in (english, chinese)]
        assert spans[0] == spans[1]
    assert len(said(r"^#+ ", english)) == len(said(r"^#+ ", chinese))
    # Digits of the results; thousands are cut off by commas and points alike.
    rows = [said(r"^\|.*\|$", text) for text in (english, chinese)]
    figures = [[sorted(re.findall(r"\d+\.\d+", row)) for row in table] for table in rows]
    assert figures[0] == figures[1]


def test_code_samples_work(tmp_path):
    samples = blocks(ROOT / "docs" / "extending.md", "python")
    assert len(samples) > 10
    for number, sample in enumerate(samples):
        (tmp_path / f"sample{number}.py").write_text(sample)
    program = (
        f"import runpy\nfor n in range({len(samples)}): runpy.run_path(f'sample{{n}}.py', run_name=f'sample{{n}}')"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
