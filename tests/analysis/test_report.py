"""The page of a study, in a real browser: nothing is asked of a network, and what can be clicked answers."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from analysis import drawings, receipts, report, tables
from contract import rundir

MakeStudy = Callable[..., Path]
REPORTED = [{"row": "Latent & <MIM>", "column": "1-NN", "value": 70.5, "source": "Wei et al., Table 1"}]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        missing = "no Chromium: apt-get install chromium chromium-driver"
        assert "chromium" not in os.environ.get("SIGHTLINE_REQUIRE", "").split(","), missing
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs[1])))
    yield driver
    driver.quit()


def end(folder: Path, attempt: str, **more: Any) -> None:
    journal = rundir.Journal(rundir.attempts_file(folder, 0))
    about = {"attempt": attempt, "host": "n1/pid:[1]"}
    journal.append({"event": "start", **about, "time": 1.0, "environment": "e0e0"})
    journal.append({"event": "end", **about, "time": 2.0, "seconds": 1800, "gpu_seconds": 3600, **more})
    journal.close()


@pytest.fixture
def study(make_study: MakeStudy, output_dir: Path) -> Path:
    """Two rows, two columns; a run that failed twice before it finished, one of other code, pictures, a command."""
    manifest = make_study(reported=REPORTED)
    failed = output_dir / "main_lmim" / "aaa10"
    end(failed, "b1", cause="failed", why="CUDA OOM", said="CUDA out of memory. Tried <2 GB>")
    end(failed, "b2", cause="failed", why="CUDA OOM", said="CUDA out of memory. Tried <2 GB>")
    end(failed, "b3", cause="finished")
    around = {"python": "3.11.7", "packages": {"torch": "2.5.1"}, "gpus": ["NVIDIA H100"], "threads": 4}
    rundir.write_json(rundir.environment_file(failed, "e0e0"), around)
    (failed / rundir.FIGURES).mkdir()
    Image.new("RGB", (900, 600), "red").save(failed / rundir.FIGURES / "maps.png")
    launch = output_dir / "submissions" / "1"
    launch.mkdir(parents=True)
    said = {"time": 1.7e9, "host": "login1", "command": ["fill", "demo", "env.setup=[a b]"]}
    rundir.write_json(launch / "manifest.json", {**said, "runs": [{"identity": "aaa10", "started": True}]})
    return manifest


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def page(pages: Path, request: pytest.FixtureRequest) -> Path:
    """Made once: the tests only look at it."""
    path = pages / "demo.html"
    if not path.exists():
        assert report.main(["--manifest", str(request.getfixturevalue("study")), "--output", str(path)]) == 0
    return path


def opened(browser: webdriver.Chrome, page: Path, wide: int = 1280) -> webdriver.Chrome:
    size = {"width": wide, "height": 900, "deviceScaleFactor": 1, "mobile": wide < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance")
    browser.get(page.as_uri())
    return browser


def test_the_page_asks_no_network_and_logs_no_error(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in urls} == {"file", "data"}
    assert browser.get_log("browser") == []
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert len(pictures) >= 3  # cells, a learning curve, the run's own picture
    for each in pictures:
        assert each.get_attribute("alt")
        assert browser.execute_script("return arguments[0].naturalWidth", each) > 0
    headings = [each.text for each in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == ["Results", "Figures", "What the runs drew", "States and failures", "What it took",
                        "Where it comes from", "All runs"]  # fmt: skip


def names(browser: webdriver.Chrome) -> list[str]:
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, "table.main tbody th")]


def test_a_heading_sorts_by_number_and_what_was_reported_stays_with_its_row(
    browser: webdriver.Chrome, page: Path
) -> None:
    opened(browser, page)
    assert names(browser) == ["random encoder", "Latent & <MIM>", "reported"]
    head = browser.find_element(By.XPATH, "//table[contains(@class, 'main')]//th[contains(., '1-NN')]")
    head.find_element(By.TAG_NAME, "button").click()
    assert names(browser) == ["Latent & <MIM>", "reported", "random encoder"]
    assert head.get_attribute("aria-sort") == "descending"
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert names(browser) == ["random encoder", "Latent & <MIM>", "reported"]
    assert head.get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("scripts", [True, False])
def test_a_cell_opens_the_runs_behind_it_without_javascript_too(
    browser: webdriver.Chrome, page: Path, scripts: bool
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    try:
        opened(browser, page)
        (cell,) = browser.find_elements(By.XPATH, "//tr[th[.='Latent & <MIM>']]/td[1]/button")
        details = browser.find_element(By.ID, str(cell.get_attribute("popovertarget")))
        assert not details.is_displayed()
        cell.send_keys(Keys.ENTER)
        assert details.is_displayed()
        for said in ("bb010", "bb011", "bb012", "0.713", "abc", "Latent & <MIM>, 1-NN: 71.3"):
            assert said in details.text
        cell.send_keys(Keys.ESCAPE)
        assert not details.is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("wide", [390, 1280])
def test_only_tables_and_figures_scroll_sideways(browser: webdriver.Chrome, page: Path, wide: int) -> None:
    opened(browser, page, wide)
    browser.find_element(By.CSS_SELECTOR, "#runs-list summary").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= wide
    shot = browser.get_screenshot_as_png()
    assert Image.open(io.BytesIO(shot)).size[0] == wide


def test_runs_can_be_searched_and_the_page_printed(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    browser.find_element(By.CSS_SELECTOR, "#runs-list summary").click()
    browser.find_element(By.ID, "find").send_keys("knn latent")
    rows = browser.find_elements(By.CSS_SELECTOR, "#all tbody tr")
    assert (len(rows), len([row for row in rows if row.is_displayed()])) == (18, 3)
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")


def test_the_page_says_what_failed_what_it_took_and_where_it_comes_from(page: Path) -> None:
    text = page.read_text()
    plain = re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL))
    assert "pretrain CUDA OOM 1 2 2 GPU-h CUDA out of memory. Tried &lt;2 GB&gt; aaa10" in plain
    assert "<MIM>" not in text
    assert "python launcher.py fill demo &#39;env.setup=[a b]&#39;" in text
    for said in ("torch 2.5.1", "gpus NVIDIA H100", "threads 4", "70.5 [1]", "18 finished", "4 of 4 complete"):
        assert said in plain


def test_receipts_are_csv_per_cell_per_cause_and_in_all(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--manifest", str(study), "--receipts", "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["kind"] for line in lines].count("cell") == 4
    (oom,) = [line for line in lines if line["cause"] == "CUDA OOM"]
    assert (oom["stage"], oom["runs"], oom["attempts"], oom["gpu_hours"], oom["lost_gpu_hours"]) == (
        "pretrain", "1", "2", "2.0", "2.0"
    )  # fmt: skip
    mim = [line for line in lines if line["row"] == "Latent & <MIM>"]
    assert {line["with_parents_gpu_hours"] for line in mim} == {"3.0"}
    (total,) = [line for line in lines if line["kind"] == "total"]
    assert (total["gpu_hours"], total["lost_gpu_hours"], total["runs"]) == ("3.0", "2.0", "18")  # shared runs once
    assert tables.main(["--manifest", str(study), "--receipts"]) == 0
    assert "CUDA OOM" in capsys.readouterr().out


def test_an_attempt_that_runs_is_not_lost_and_one_without_a_last_word_is(
    output_dir: Path, make_run: Callable[..., Path]
) -> None:
    folder = make_run("a1", steps=1)
    ledger = receipts.Ledger(output_dir)
    assert [each.cause for each in ledger.entry("a1").attempts()] == ["no last word"]
    owner = rundir.claim(folder, new_attempt=lambda: "a1")
    assert [each.cause for each in receipts.Ledger(output_dir).entry("a1").attempts()] == ["running"]
    owner.release()
    assert receipts.Ledger(output_dir).entry("nowhere").folder is None


def test_an_empty_study_and_damaged_pictures_make_a_page_too(
    study: Path, output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (output_dir / "main_lmim" / "aaa10" / rundir.FIGURES / "maps.png").write_bytes(b"no picture")
    assert report.main(["--manifest", str(study), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert "maps.png: unreadable" in capsys.readouterr().err
    for worker in ("main_lmim", "main_knn", "main_linprobe"):
        shutil.rmtree(output_dir / worker)
    assert report.main(["--manifest", str(study)]) == 0
    path = output_dir / "reports" / "demo.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert "12 new" in path.read_text()
    assert report.main(["--manifest", str(tmp_path / "none.json")]) == 2


def test_long_curves_are_thinned_to_what_an_eye_sees(
    make_study: MakeStudy, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables.load(make_study())
    monkeypatch.setattr(drawings, "POINTS", 10)
    points = drawings.figures.panels(table)[0][2]
    thin = drawings._thinned(points, rows=1)
    assert set(thin["step"]) == set(points["step"])  # 20 steps are few
    many = points.loc[points.index.repeat(100)].assign(step=range(100 * len(points)))
    kept = drawings._thinned(many, rows=1)["step"]
    assert (len(kept), kept.min(), kept.max()) == (50, 0, 100 * len(points) - 1)
