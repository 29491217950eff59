"""Every code block of the docs and the README does what it says.

Blocks of a page are run in order in one folder, Python ones in one name space. Comments in a page
steer this, for the reader of its source to see:

    <!-- first: CODE -->        Python that the next block needs and the reader does not
    <!-- not run: WHY -->       the next block is not run, for this reason

Commands are run as they stand but for what makes them long (`SMALL`), those without --local on the
tests' own Ray, in few actors (`PACKED`). Those that need a cluster elsewhere or a job server, or
take long (`READ`, `ELSEWHERE`), are parsed by the command line and go no further.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import half_step
import hdnn_dist
import reference
from hdnn_dist.cli import app, main
from hdnn_dist.job import Job
from hdnn_dist.reader import json_schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, *(ROOT / name for name in ("SECURITY.md", "CHANGELOG.md"))]
TEXTS += [*ROOT.glob("deploy/**/README.md"), ROOT / "docker" / "README.md"]
_BLOCK = re.compile(
    r"((?:^<!--(?:(?!-->).)*-->\n+)*)^(```+)([^\n]*)\n(.*?)^\2$", re.MULTILINE | re.DOTALL
)
_STEER = re.compile(r"<!-- (first|not run):\s+(.*?)\s*-->", re.DOTALL)

# What no command of the docs needs to show, by command.
TINY = [f"--set={key}" for key in ("training.epochs=1", "training.batch_size=32", "model.layers=2")]
CUT = ["--set=data.train_samples=64", "--set=data.test_samples=30", "--set=training.dtype=float32"]
SMALL = {
    "train": [*TINY, *CUT, "--set=training.distort=null"],
    "resume": ["--set=training.epochs=2"],
    "eval": [],
    "predict": [],
    "analyze": ["--baselines=none", "--samples=2"],
    "report": ["--worst=0", "--no-bsm"],
}
PACKED = "--set=cluster.agents_per_actor=16"
HERE = "--data-dir"  # of MNIST, the made-up one of which no other process knows
READ = {"submit", "status", "logs", "stop", "calibrate"}  # the last takes most of a minute
ELSEWHERE = ("--address", "s3://")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, what it says, and what steers it."""

    page: Path
    line: int
    language: str
    text: str
    first: str | None
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for match in _BLOCK.finditer(text):
        steer = dict(_STEER.findall(match[1]))
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(
            Block(page, line, match[3], match[4], steer.get("first"), steer.get("not run"))
        )
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, as `runs/RUN`."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    spec = ["topologies/ring8.yaml", *TINY, *CUT, "--set=training.epochs=2", "--local"]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(ROOT / spec[0]), *spec[1:], "--run", str(folder), "--no-tensorboard"])
    assert ended.value.code in (0, None)
    return folder


@pytest.fixture
def workplace(run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout in which something was trained."""
    (tmp_path / "runs").mkdir()
    for name in ("RUN", "ONE", "OTHER"):
        shutil.copytree(run, tmp_path / "runs" / name)
    for name in ("topologies", "Makefile", "benchmarks", "examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "FOLDER_OF_THE_IDX_FILES").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def is_parsed(words: list[str]) -> bool:
    """Whether a command of `hdnn-dist` is not run."""
    return words[0] in READ or any(word.startswith(ELSEWHERE) for word in words)


def is_for_ray(words: list[str]) -> bool:
    return words[0] in SMALL and not is_parsed(words) and not {"--local", HERE} & {*words}


def marked(page: Path) -> Any:
    """The page as a parameter, marked if some of its commands are for Ray."""
    shell = (b for b in blocks(page) if b.language in ("sh", "bash") and b.why_not is None)
    found = (words for block in shell for words in commands(block) if words[0] == "hdnn-dist")
    marks = [pytest.mark.cluster] * any(is_for_ray(words) for _, *words in found)
    return pytest.param(page, marks=marks, id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_every_block_of_a_page_does_what_it_says(
    page: Path, workplace: Path, request: pytest.FixtureRequest
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.why_not is not None:
            continue
        if block.first is not None:
            exec(compile(block.first, str(block), "exec"), names)
        if block.language == "python":
            # Lines are those of the page, so that a traceback leads there.
            tree = ast.increment_lineno(ast.parse(block.text), block.line)
            exec(compile(tree, str(page), "exec"), names)
        elif block.language in ("sh", "bash"):
            for words in commands(block):
                if is_for_ray(words[1:]):
                    request.getfixturevalue("cluster")
                obey(words, block)
        elif block.language == "yaml":
            fitted(block.text)
        else:
            assert block.language in ("", "text"), f"{block}: what is {block.language}?"
            assert not re.search(r"^(hdnn-dist|make|pip|python)\b", block.text, re.MULTILINE), (
                f"{block}: a command that is not run; say that it is sh"
            )


def obey(words: list[str], block: Block) -> None:
    """Run a command of `hdnn-dist`, or see that another one is there."""
    name, *rest = words
    if name == "make":
        assert re.search(rf"^{rest[0]}:", Path("Makefile").read_text(), re.MULTILINE), block
    elif name == "python":
        script = Path(*rest[1].split(".")).with_suffix(".py") if rest[0] == "-m" else Path(rest[0])
        source = script.read_text()
        for option in (word for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{block}: {script} has no {option}"
    else:
        assert name == "hdnn-dist", f"{block}: {name} is not run here; say why not"
        hdnn(rest, block)


def hdnn(words: list[str], block: Block) -> None:
    command = words[0]
    if is_parsed(words):
        parsed = typer.main.get_command(app).commands[command]
        parsed.make_context(command, words[1:])
        return
    if ">" in words:
        words = words[: words.index(">")]
    kind = "resume" if "--resume" in words else command
    more = [word for word in SMALL.get(kind, []) if word not in words]
    more += ["--local"] * (HERE in words)
    packed = [PACKED] * is_for_ray(words)  # unless the command says otherwise, after it
    with pytest.raises(SystemExit) as ended:
        main([command, *packed, *words[1:], *more])
    assert ended.value.code in (0, None), f"{block}: {' '.join(words)}: {ended.value.code}"


def fitted(text: str) -> None:
    """YAML is a spec, or sections of one."""
    if "topology:" not in text:
        text += "topology: {agents: 2, edges: [[a1, a2]]}\n"
    Path("block.yaml").write_text(text)
    Job.load("block.yaml")


def test_what_is_not_run_says_why() -> None:
    left_out = [block for block in ALL if block.why_not is not None]
    for block in left_out:
        assert len((block.why_not or "").split()) >= 3, block
        print(f"{block}: {block.why_not}")
    assert len(left_out) < len(ALL) / 5, "most blocks are run"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_every_link_leads_somewhere(text: Path) -> None:
    content = re.sub(r"^```.*?^```", "", text.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", content)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or path.startswith("reference/"):  # made with the site
            continue
        there = (text.parent / path) if path else text
        assert there.exists() or there.with_suffix(".ipynb").exists(), target
        if anchor:
            assert anchor in anchors(there), target


def anchors(text: Path) -> set[str]:
    """The headings of a text as a site and a forge name them."""
    heads = re.findall(r"^#+ (.*)$", text.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head)) for head in heads)
    return {re.sub(r"\s+", "-", head.strip().lower()) for head in plain}


def test_every_key_of_a_spec_is_in_the_reference_with_a_description() -> None:
    schema = json_schema()
    sections = {"Spec": schema, **schema["$defs"]}
    page = reference.spec_page()
    for name, section in sections.items():
        part = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key, field in section["properties"].items():
            assert f"\n| `{key}` |" in part, f"{name}.{key}"
            assert len(reference.description(field, sections)) > 5, f"{name}.{key} says nothing"


def test_every_command_and_option_is_in_the_reference() -> None:
    page = reference.cli_page()
    found = dict(reference.commands())
    assert {"hdnn-dist train", "hdnn-dist topology draw"} <= found.keys()
    for path, command in found.items():
        part = page.split(f"\n## {path}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"| `{option}" in part or f" {option}" in part, f"{path} {option}"


def test_everything_exported_is_in_the_reference() -> None:
    named = set(re.findall(r"^::: hdnn_dist\.\w+\.(\w+)$", reference.api_page(), re.MULTILINE))
    assert named == set(hdnn_dist.__all__) - {"__version__"}


def test_the_picture_of_a_half_step_is_what_its_script_draws() -> None:
    drawn = {text.get_text() for axes in half_step.draw().axes for text in axes.texts}
    picture = (ROOT / "docs" / "half-step.svg").read_text()
    assert all(f">{text}<" in picture for text in drawn if text)


def test_notebooks_are_kept_without_what_they_answered() -> None:
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path
