from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import hdnn_dist
from hdnn_dist.check import examine, this_machine
from hdnn_dist.console import size
from hdnn_dist.errors import CheckpointError, UserError
from hdnn_dist.page import write_page
from hdnn_dist.run import reopen
from hdnn_dist.storage import read, read_text
from tests.commands import hdnn
from tests.strategies import numbers

TINY = [
    "topology.name=<b>$ring$</b>",
    "topology.agents=4",
    "topology.edges.args.n=4",
    "topology.d=2",
    "model.layers=3",
    "data.train_samples=96",
    "training.batch_size=32",
    "training.epochs=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their depth, and that of a set without images."""
    folder = tmp_path_factory.mktemp("runs")
    plane = ["data.name=double_moons", "data.split={kind: auto, agents: [a1, a2]}"]
    for name, own in (("one", []), ("two", ["model.layers=4"]), ("plane", plane)):
        hdnn_dist.train(overrides=[*TINY, *own], run=folder / name, local=True)
    return [folder / "one", folder / "two", folder / "plane"]


class Links(HTMLParser):
    """Collects all that a page would fetch, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]


def test_a_run_is_a_page_that_needs_nothing_else(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn("report", runs[0], "--local") == 0
    page = runs[0] / "report" / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert all(link.startswith(("#", "data:")) for link in Links(page).found)
    text = page.read_text()
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert "<b>$ring$" not in text  # names are the user's
    assert "&lt;b&gt;$ring$&lt;/b&gt; learns digits" in text
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert f"<td>{summary['test_accuracy']:.2%}</td>" in text
    assert f"<td>{summary['test_loss']:.4f}</td>" in text
    assert "layers: 3" in text  # the resolved spec
    assert f"hdnn-dist eval {runs[0]}" in text
    assert text.count('alt="Test sample ') == 12
    names = {file.stem for file in page.parent.glob("*.png")}
    assert names == {
        "topology",
        "loss",
        "accuracy",
        "gradients",
        "sensitivities",
        "times",
        "confusion",
    }


def test_runs_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    page = write_page(runs[:2], out=tmp_path / "both", local=True, worst=0, bsm=False)
    text = Path(str(page)).read_text()
    assert "2 runs side by side" in text
    assert '<th scope="row">model.layers</th><td>3</td><td>4</td>' in text
    assert "keys</summary>" not in text
    assert "<img" not in text
    assert "2: two: Backward sensitivities were not measured" in text
    names = {file.stem for file in (tmp_path / "both").glob("*.png")}
    assert {"loss", "topology-1", "topology-2", "confusion-2"} <= names


def regression(run: Path, own: bool) -> hdnn_dist.Summary:
    """A short run on targets, read out at the root or by agents their own."""
    targets = {"b1": ["y6"], "b2": ["y0", "y3"]}
    spec = {
        "topology": {"agents": ["b1", "b2"], "d": 2, "edges": [["b1", "b2"]]},
        "data": numbers() | ({"targets": targets} if own else {}),
        "training": {"epochs": 2, "batch_size": 10},
        "cluster": {"replicas": 2},
    }
    return hdnn_dist.train(spec, run=run, local=True)


@pytest.mark.parametrize("own", [False, True])
def test_a_regression_stands_beside_a_classification(
    own: bool, runs: list[Path], tmp_path: Path
) -> None:
    summary = regression(tmp_path / "run", own)
    places = [runs[0], tmp_path / "run"]
    page = write_page(places, out=tmp_path / "both", local=True, worst=0, bsm=False)
    text = Path(str(page)).read_text()
    assert f"<td>–</td><td>{summary.test_rmse:.4g}</td>" in text
    assert f'<th scope="row">best test R²</th><td>–</td><td>{summary.best_test_r2:.4f}' in text
    assert ("b1, root" in text) == (not own)
    told = examine(reopen(tmp_path / "run"), [this_machine()])
    [sums] = [phase for phase in told.step if "copies" in phase.name]
    row = '<th scope="row">sent a step between copies</th><td>–</td>'
    assert f"{row}<td>{size(sums.bytes)}</td>" in text
    assert "keys</summary>" in text  # another topology: too many to read past
    made = {file.stem for file in (tmp_path / "both").glob("*.png")}
    assert {"accuracy", "rmse", "confusion-1", "fit-2", "errors-2"} <= made
    assert not {"confusion-2", "fit-1", "errors-1"} & made
    assert ("of 2. Least" if own else "of 7. Least") in text  # errors of agents, or of targets


def test_a_run_at_a_url_has_its_page_there(runs: list[Path]) -> None:
    run = "memory://page/run"
    hdnn_dist.train(overrides=TINY, run=run, local=True)
    page = write_page([run], local=True, bsm=False, worst=0)
    assert str(page) == f"{run}/report/report.html"
    assert "layers: 3" in read_text(page)
    assert read(page.parent / "loss.png", 1 << 20).startswith(b"\x89PNG")


def test_what_is_no_image_is_shown_as_numbers(runs: list[Path], tmp_path: Path) -> None:
    page = write_page([runs[2]], out=tmp_path, local=True, bsm=False, worst=1)
    assert re.search(
        r"taken for [01] .*\(-?[\d.e-]+, -?[\d.e-]+\)", Path(str(page)).read_text(), re.S
    )


def test_a_run_that_was_cut_short_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "cut"
    shutil.copytree(runs[0], run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    records = (run / "metrics.jsonl").read_text().splitlines()
    left = {"kind": "agents", "step": 3, "left": ["a3"], "joined": []}
    odd = {"kind": "train", "step": 4, "loss": None, "accuracy": "half"}
    far = {"kind": "train", "step": 10**400, "loss": 1.0, "accuracy": 10**400}
    (run / "metrics.jsonl").write_text(
        "\n".join([*records[:3], *map(json.dumps, (left, odd, far))])
    )
    text = Path(str(write_page([run], local=True, bsm=False))).read_text()
    assert "<td>3 of 6</td>" in text
    assert "step 3: left a3; joined nobody" in text
    assert "no record of the gradients" in text
    assert "no record of the agents&#39; time" in text


def test_where_the_time_went_and_who_shared_an_actor(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "timed"
    shutil.copytree(runs[0], run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "times"]

    def record(step: int, *actors: tuple[list[str], list[float]]) -> str:
        shared = {"steps": 3, "total": 0.3, "wait": 0.03, "node": "here <1>"}
        own = [{"agents": names, "compute": compute, **shared} for names, compute in actors]
        return json.dumps({"kind": "times", "step": step, "actors": own})

    def page(*records: str) -> str:
        (run / "metrics.jsonl").write_text("\n".join([*kept, *records]))
        return Path(str(write_page([run], local=True, bsm=False, worst=0))).read_text()

    halves = (["a1", "a2"], [0.03, 0.06]), (["a3", "a4"], [0.09, 0.09])
    text = page(record(2, *halves), record(5, *halves))
    # A step takes 100 ms: a2 computes 20, its actor waits 10, a1 computes 10, the rest is 60.
    assert "a2: compute 20 ms, send 60 ms, wait 20 ms." in text
    assert "a3, a4 see 16 of 64 features, in actor 1." in text
    assert "here &lt;1&gt;" in text
    three = record(5, (["a1", "a2", "a3"], [0.1] * 3))
    torn = [
        '{"kind": "times", "step": 1, "actors": [1]}',
        record(5, (["a1", "a2", "a3", "a4"], [0.1])),
        record(5, (["a1", "a2", "a3", "a4"], [float("nan")] * 4)),
    ]
    for records in ([record(2, *halves), three], *([line] for line in torn)):
        assert "no record of the agents&#39; time" in page(*records)


def test_what_cannot_be_a_page_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="9 runs"):
        write_page([runs[0]] * 9)
    with pytest.raises(CheckpointError, match=r"no spec\.yaml"):
        write_page([runs[0], tmp_path], local=True)
    (tmp_path / "file").touch()
    assert hdnn("report", runs[0], "--local", "--out", tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, where there is one."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu"]
            )
        except api.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    both = write_page(runs[:2], out=folder / "both", local=True, bsm=False, worst=4)
    alone = write_page(runs[:1], out=folder / "alone", local=True)
    regression(folder / "numbers-run", own=True)
    fit = write_page([folder / "numbers-run"], out=folder / "numbers", local=True)
    return {"both": Path(str(both)), "alone": Path(str(alone)), "numbers": Path(str(fit))}


MISTAKES = """() => {
  const found = [], ids = new Set(), all = selector => [...document.querySelectorAll(selector)];
  const root = document.documentElement, said = e => e.outerHTML.slice(0, 60);
  if (root.scrollWidth > innerWidth) found.push("wider than the window");
  for (const e of all("[id]")) {
    if (ids.has(e.id)) found.push("an id twice: " + e.id);
    ids.add(e.id);
  }
  for (const e of all("svg[role=img]"))
    if (!/[0-9]/.test(e.getAttribute("aria-label"))) found.push("no numbers in words: " + said(e));
  for (const e of all("img"))
    if (!e.alt || !e.naturalWidth) found.push("no words or no picture: " + said(e));
  for (const e of all("a"))
    if (!document.querySelector(e.getAttribute("href"))) found.push("leads nowhere: " + said(e));
  let level = 0;
  for (const e of all("h1, h2, h3, h4")) {
    if (+e.tagName[1] > level + 1) found.push("no heading above it: " + said(e));
    level = +e.tagName[1];
  }
  for (const e of all("*"))
    if (e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0)
      if (getComputedStyle(e).overflowX == "auto") found.push("no key scrolls it: " + said(e));
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map(v => linear(+v));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  for (const e of all("body *")) {
    if (e.tagName.toLowerCase() == "style") continue;
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), ink = light(e.closest("svg") ? style.fill : style.color);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) found.push("hard to read: " + said(e));
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["alone", "both", "numbers"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_reads_well_in_a_browser(
    browser: Any, pages: dict[str, Path], which: str, scheme: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    fetched: list[str] = []
    told: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(pages[which].as_uri())
    assert [url for url in fetched if not url.startswith("data:")] == [pages[which].as_uri()]
    assert not told
    assert page.evaluate(MISTAKES) == []
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", shade)[0]) < 128) == (scheme == "dark")
    page.screenshot(path=pages[which].parent / f"{width}-{scheme}.png", full_page=True)
    page.close()


@pytest.mark.slow
def test_keys_reach_all_that_can_be_worked(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(pages["alone"].as_uri())
    focused = "document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "To the content"
    assert page.locator("a.skip").bounding_box()["x"] >= 0  # in sight as soon as it has the focus
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(focused) == "Resolved spec":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert not page.locator("details pre").is_visible()
    page.keyboard.press("Enter")
    assert page.locator("details pre").is_visible()
    page.close()
