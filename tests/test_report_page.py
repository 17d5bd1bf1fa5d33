"""The HTML page of a leaderboard: what its file holds, and what a person finds in a browser."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import browser
import pytest
from board_example import FAILED, HOSTILE, NAMED_SO, REFUSED, board
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from recbole_llm.leaderboard.report import page, write_page

# Seconds to wait for what a page draws in a tenth of one: only a machine that hangs is slower.
PATIENCE = 30


# --- the file --------------------------------------------------------------------------------------------------------
class Seen(HTMLParser):
    """Tags in order with their attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def made() -> str:
    return page(board())


def test_the_file_names_no_source_elsewhere(made: str) -> None:
    seen = Seen(made)
    sources = [
        value
        for tag, attributes in seen.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster") and value
    ]
    assert sources == ["data:,", "#leaderboard"]
    style = made[made.index("<style>") : made.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(attributes["content"] for tag, attributes in seen.tags if "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")


def test_the_file_holds_the_board_and_no_script_of_its_titles(made: str) -> None:
    seen = Seen(made)
    assert len(seen.scripts) == 5
    assert json.loads(seen.scripts[1]) == board()
    assert "<" not in seen.scripts[1]


def test_a_title_cannot_stand_for_a_part_of_the_page() -> None:
    hostile = board() | {"title": "{{board}} </title><script>window.hacked = 4</script>"}
    seen = Seen(page(hostile))
    assert len(seen.scripts) == 5
    assert json.loads(seen.scripts[1])["title"] == hostile["title"]


def test_numbers_that_are_none_are_unknown() -> None:
    odd = board()
    odd["tables"][0]["rows"][0]["metrics"]["ndcg@10"] |= {"std": float("nan"), "high": float("inf")}
    value = json.loads(Seen(page(odd)).scripts[1])["tables"][0]["rows"][0]["metrics"]["ndcg@10"]
    assert value["std"] is None and value["high"] is None


# Pieces of scripts: all of a selector's elements as an array; the name of the row or the list that an element is in.
ALL = "[...document.querySelectorAll"
NAME = "node.closest('tr').cells[0].firstChild.textContent"
LIST = "node.closest('.panel').querySelector('h3').childNodes[1].textContent.trim()"
DRAWN = f"return {ALL}('.plot')].filter((plot) => plot.querySelector('svg .trace, svg .bars')).length"
SYMBOLS = f"""return {ALL}('#cost-plot .trace')].map((node) => {{
    const point = node.querySelector('path.point');
    return [point.getAttribute('d'), getComputedStyle(point).fill];
}})"""


# --- the page in a browser -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def session() -> Iterator[Chrome]:
    with browser.opened() as driver:
        yield driver


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    write_page(board(), path)
    return path.as_uri()


@pytest.fixture
def driver(session: Chrome, place: str) -> Iterator[Chrome]:
    """The page, opened anew; whatever a test did, it asked nothing of the network and said nothing on the console."""
    with visit(session, place):
        yield session


@contextlib.contextmanager
def visit(session: Chrome, address: str) -> Iterator[None]:
    # Elsewhere first: from one hash to another of the same file a browser does not load again.
    session.get("about:blank")
    browser.console(session)
    browser.requests(session)
    session.get(address)
    until(session, lambda: cells(session, "#rows tbody th"))
    yield
    assert browser.console(session) == []
    assert {one.partition("#")[0] for one in browser.requests(session)} <= {address.partition("#")[0]}
    assert session.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert session.execute_script("return window.hacked ?? null") is None


def until(session: Chrome, holds: Callable[[], Any]) -> Any:
    return WebDriverWait(session, PATIENCE, poll_frequency=0.05).until(lambda _: holds())


def cells(session: Chrome, selector: str) -> list[str]:
    """Texts, read in one go, so that nothing can be drawn anew between two of them."""
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    return session.execute_script(script, selector)


def names(session: Chrome) -> list[str]:
    """The rows shown, in order, without the small print."""
    script = "return [...document.querySelectorAll('#rows tbody th')].map((node) => node.firstChild.textContent)"
    return session.execute_script(script)


def header(session: Chrome, key: str) -> WebElement:
    return session.find_element(By.CSS_SELECTOR, f"#rows th button[data-key='{key}']")


def until_marked(session: Chrome, target: str) -> None:
    """The example user with this target is open."""
    until(session, lambda: cells(session, "#person .panel:first-child .target")[:1] == [target])


def direction(session: Chrome, key: str) -> str | None:
    return header(session, key).find_element(By.XPATH, "..").get_attribute("aria-sort")


def ranked(metric: str = "ndcg@10", table: int = 0) -> list[str]:
    rows = [row for row in board()["tables"][table]["rows"] if row["metrics"]]
    return [row["name"] for row in sorted(rows, key=lambda row: -row["metrics"][metric]["mean"])]


def by_cost(cost: str) -> list[str]:
    """Rows, cheapest first; unknown last."""
    rows = [row for row in board()["tables"][0]["rows"] if row["metrics"]]
    return [row["name"] for row in sorted(rows, key=lambda row: row["cost"][cost])]


def test_the_table_opens_ranked_by_the_boards_metric(driver: Chrome) -> None:
    assert names(driver) == ranked()
    assert direction(driver, "metric") == "descending" and direction(driver, "seconds") == "none"
    best = next(row for row in board()["tables"][0]["rows"] if row["name"] == ranked()[0])["metrics"]["ndcg@10"]
    first = driver.find_elements(By.CSS_SELECTOR, "#rows tbody tr")[0].text
    assert f"{best['mean']:.4f}" in first and f"{best['low']:.4f} to {best['high']:.4f}" in first
    bold = [row["name"] for row in board()["tables"][0]["rows"] if row["metrics"] and row["metrics"]["ndcg@10"]["bold"]]
    assert bold and driver.execute_script(f"return {ALL}('.value.bold')].map((node) => {NAME})") == bold
    mark = driver.find_element(By.CSS_SELECTOR, "#rows .mark.up")
    assert "after Holm's correction" in (mark.get_attribute("title") or "")


def test_durations_are_rounded_before_they_are_told(driver: Chrome) -> None:
    told = driver.execute_script("return [59.6, 119.6, 3599.7, 3.14159, 59.4].map(duration)")
    assert told == ["1 min 0 s", "2 min 0 s", "1 h 0 min", "3.1 s", "59 s"]


def test_a_click_or_a_key_on_a_header_sorts(driver: Chrome) -> None:
    header(driver, "seconds").click()
    until(driver, lambda: direction(driver, "seconds") == "descending")
    assert names(driver) == by_cost("seconds")[::-1]
    # From the keyboard, on the same header: the focus has stayed although the table was drawn anew.
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    until(driver, lambda: direction(driver, "seconds") == "ascending")
    assert names(driver) == by_cost("seconds")
    header(driver, "name").click()
    until(driver, lambda: direction(driver, "name") == "ascending")
    assert sorted(names(driver), key=str.lower) == names(driver) and direction(driver, "seconds") == "none"


def test_what_is_unknown_stands_last_either_way(driver: Chrome) -> None:
    known = [row["name"] for row in board()["tables"][0]["rows"] if row["cost"]["tokens"] is not None]
    header(driver, "tokens").click()
    until(driver, lambda: direction(driver, "tokens") == "descending")
    assert sorted(names(driver)[: len(known)]) == sorted(known)
    header(driver, "tokens").click()
    until(driver, lambda: direction(driver, "tokens") == "ascending")
    assert sorted(names(driver)[: len(known)]) == sorted(known)


def test_names_and_kinds_filter_rows_and_charts(driver: Chrome) -> None:
    driver.find_element(By.ID, "text").send_keys("glta, BPR")
    until(driver, lambda: len(names(driver)) == 3)
    assert set(names(driver)) == {"GLTA", "GLTA, no alignment", "BPR"}
    until(driver, lambda: "3 of 8" in driver.find_element(By.ID, "status").text)
    until(driver, lambda: cells(driver, "#depth-plot .legendtext") == ["GLTA", "GLTA, no alignment", "BPR"])
    driver.find_element(By.CSS_SELECTOR, "#kinds input[value='language']").click()
    until(driver, lambda: names(driver) == ["BPR"])
    driver.find_element(By.ID, "text").send_keys(" or none of them")
    until(driver, lambda: names(driver) == [])


def test_another_metric_ranks_anew(driver: Chrome) -> None:
    Select(driver.find_element(By.ID, "metric")).select_by_visible_text("Recall@10")
    until(driver, lambda: "Recall@10" in header(driver, "metric").text)
    assert names(driver) == ranked("recall@10")
    first = next(row for row in board()["tables"][0]["rows"] if row["name"] == ranked("recall@10")[0])
    assert f"{first['metrics']['recall@10']['mean']:.4f}" in cells(driver, "#rows tbody tr")[0]
    assert "metric=recall%4010" in driver.current_url


def test_every_metric_in_one_table(driver: Chrome) -> None:
    driver.find_element(By.CSS_SELECTOR, "#view input[value='all']").click()
    until(driver, lambda: len(cells(driver, "#rows thead th")) == 1 + len(board()["metrics"]))
    header(driver, "mrr@10").click()
    until(driver, lambda: direction(driver, "mrr@10") == "descending")
    assert names(driver) == ranked("mrr@10")


def test_charts_are_drawn(driver: Chrome) -> None:
    shown = board()["tables"][0]
    charts = 4 + len(shown["breakdowns"]) + len(shown["curve"]["metrics"])
    until(driver, lambda: driver.execute_script(DRAWN) == charts)
    # Baselines and language models differ by shape and by colour.
    drawn_points = driver.execute_script(SYMBOLS)
    assert len(drawn_points) == 3
    assert len({shape for shape, _ in drawn_points}) == 3 and len({colour for _, colour in drawn_points}) == 3
    groups = board()["tables"][0]["breakdowns"][0]["groups"]
    ticks = cells(driver, "#groups-plots figure:first-child .xtick text")
    assert ticks == [f"{group['label']}n = {group['count']}" for group in groups]
    Select(driver.find_element(By.ID, "cost-choice")).select_by_visible_text("Trainable parameters")
    note = driver.find_element(By.ID, "cost-note")
    until(driver, lambda: "ItemKNN, Pop" in note.text)


def test_metrics_over_a_setting_are_drawn_line_by_line(driver: Chrome) -> None:
    curve = board()["tables"][0]["curve"]
    figures = "#curve-plots figure"
    until(driver, lambda: len(driver.find_elements(By.CSS_SELECTOR, f"{figures} .main-svg .trace")) >= 8)
    assert cells(driver, f"{figures} h3") == ["NDCG@10", "Consistency@10"]
    assert "alpha" in driver.find_element(By.ID, "curve-title").text
    first = f"{figures}:first-child"
    assert cells(driver, f"{first} .legendtext") == [line["name"] for line in curve["lines"]]
    assert cells(driver, f"{first} .xtick text") == ["0", "0.05", "1"]
    # Of every line its means, and each seed's own.
    counts = driver.execute_script(
        f"return {ALL}('{first} .trace')].map((one) => one.querySelectorAll('.point').length)"
    )
    assert counts == [3, 9, 3, 9]
    # One row does not agree with any teacher.
    second = driver.execute_script(f"return document.querySelectorAll('{figures}')[1].querySelector('.plot').data")
    assert [len(trace["x"]) for trace in second] == [3, 9, 2, 6]


def test_a_row_is_shown_beside_its_own_base_and_with_what_was_chosen_for_it(driver: Chrome) -> None:
    row = board()["tables"][0]["rows"][1]
    own = row["metrics"]["ndcg@10"]["own"]
    place = names(driver).index(row["name"])
    column = cells(driver, "#rows thead th").index("Against its own base, adjusted p")
    shown = driver.find_elements(By.CSS_SELECTOR, "#rows tbody tr")[place].find_elements(By.CSS_SELECTOR, "th, td")[
        column
    ]
    assert f"{abs(own['difference']):.4f}" in shown.text and "GLTA" in shown.text
    others = [cell for number, cell in enumerate(column_of(driver, column)) if number != place]
    assert set(others) == {"–"}
    facts = driver.find_element(By.ID, "facts").text
    assert "alpha 0.3, by NDCG@10 on valid with seed 2020 alone" in facts and "alpha 0.05: 0.0805" in facts
    assert "alpha 0.9: <b>the loss</b> is no number" in facts
    assert "Against its own base: " in driver.find_element(By.ID, "legend").text
    Select(driver.find_element(By.ID, "metric")).select_by_visible_text("Consistency@10")
    until(driver, lambda: "not tested" in driver.find_element(By.ID, "legend").text)


def column_of(driver: Chrome, column: int) -> list[str]:
    return cells(driver, f"#rows tbody tr > :nth-child({column + 1})")


def test_an_example_user_is_opened(driver: Chrome) -> None:
    users = board()["tables"][0]["users"]
    chooser = Select(driver.find_element(By.ID, "user"))
    assert HOSTILE[0] in chooser.options[1].text
    for number in (3, 1):
        user = users[number]
        chooser.select_by_index(number)
        target = user["targets"][0]["title"]
        until_marked(driver, target)
        assert cells(driver, "#person div:first-child > .panel:nth-child(2) li") == [
            item["title"] for item in user["history"]
        ]
        found = [name for name in ranked() if any(item["hit"] for item in user["top"][name])]
        marked = f"return {ALL}('.lists .target')].map((node) => [{LIST}, node.textContent])"
        assert sorted(driver.execute_script(marked)) == sorted([name, target] for name in found)
        assert len(driver.find_elements(By.CSS_SELECTOR, ".lists .panel")) == len(user["top"])


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_titles_stay_text(driver: Chrome, number: int) -> None:
    Select(driver.find_element(By.ID, "user")).select_by_index(number)
    until_marked(driver, HOSTILE[number])
    assert driver.find_elements(By.CSS_SELECTOR, "#person img, #person script, #person svg") == []


def test_a_name_is_shown_letter_by_letter(driver: Chrome) -> None:
    assert NAMED_SO in names(driver)
    until(driver, lambda: NAMED_SO in cells(driver, "#depth-plot .legendtext"))


def test_reasons_of_rows_without_figures_are_shown(driver: Chrome) -> None:
    reasons = driver.find_element(By.ID, "without")
    assert reasons.is_displayed()
    lines = reasons.text.splitlines()
    assert f"{FAILED[0]} failed: {FAILED[1]}" in lines
    assert f"{REFUSED[0]} refused, seeds 2020, 2021: {REFUSED[1]}" in lines
    assert "BERT4Rec failed, seed 2022: the machine went down" in lines
    assert FAILED[0] not in names(driver)


def test_a_verdict_that_a_seed_turns_around_says_so(session: Chrome, place: str) -> None:
    rows = {row["name"]: row for row in board()["tables"][0]["rows"] if row["metrics"]}
    tests = {name: row["metrics"]["ndcg@10"]["against"]["BPR"] for name, row in rows.items() if name != "BPR"}
    alike = {name: test["seeds_alike"] for name, test in tests.items() if test["mark"]}
    assert {*alike.values()} == {2, 3}, "else the test shows nothing"
    script = """return [...document.querySelectorAll('#rows tbody .mark')].map((node) =>
      [node.closest('tr').querySelector('th').firstChild.textContent, node.title, node.closest('td').textContent])"""
    with visit(session, f"{place}#table=0&metric=ndcg%4010&sort=metric&down=1&view=one"):
        marks = {name: (title, text) for name, title, text in session.execute_script(script) if "than BPR" in title}
    assert marks.keys() == alike.keys()
    for name, (title, text) in marks.items():
        assert f"of this sign in {alike[name]} of 3 seeds, over seeds p = 0.064" in title
        assert ("2 of 3 seeds" in text) == (alike[name] == 2)


def test_another_table_has_the_papers_figures_and_no_empty_sections(driver: Chrome) -> None:
    assert not driver.find_element(By.ID, "paper").is_displayed()
    Select(driver.find_element(By.ID, "table")).select_by_index(1)
    until(driver, lambda: names(driver) == ranked(table=1))
    assert driver.find_element(By.ID, "paper").is_displayed()
    figures = board()["tables"][1]["papers"][0]["rows"][0]["metrics"]["ndcg@10"]
    assert cells(driver, "#paper-figures tbody tr:first-child td")[:2] == [
        f"{figures[key]:.4f}" for key in ("paper", "ours")
    ]
    more = driver.find_element(By.ID, "paper-figures").text
    assert "P5: not built here" in more
    assert "5 systems: Spearman's rho −0.70, p = 0.233; Kendall's tau −0.60, p < 0.001" in more
    assert "BPR: valid_rows_in_test_input false" in driver.find_element(By.ID, "facts").text
    for section in ("depth", "groups", "training", "examples"):
        assert not driver.find_element(By.ID, section).is_displayed()
    assert "example users" in driver.find_element(By.ID, "left-out").text


def test_the_address_keeps_what_is_looked_at(session: Chrome, place: str) -> None:
    with visit(session, f"{place}#table=0&metric=mrr%4010&sort=seconds&down=0&view=one"):
        assert names(session) == by_cost("seconds")
        assert Select(session.find_element(By.ID, "metric")).first_selected_option.text == "MRR@10"


def bare_board() -> dict[str, Any]:
    """The least that a board can say: one row without a baseline, a test or a cost, and nothing known of the split."""
    value = {"mean": 0.1, "low": None, "high": None, "std": None, "valid": None, "bold": False, "against": {}}
    costs = ("seconds", "peak_memory_mb", "parameters", "trainable", "tokens", "users_per_second")
    row = {
        "name": "FM", "model": "FM", "kind": "context-aware", "baseline": False, "seeds": [1], "failed": [],
        "refused": [], "metrics": {"ndcg@10": value}, "at_k": {}, "cost": dict.fromkeys(costs), "curves": [],
        "settings": {}, "runs": [],
    }  # fmt: skip
    table = {
        "dataset": "tiny", "protocol": "", "column": "", "split": None, "evaluation": None, "best_baseline": None,
        "reference": None, "tests": 0, "rows": [row], "breakdowns": [], "users": [], "papers": [],
    }  # fmt: skip
    return board() | {"commit": None, "versions": {}, "metrics": ["ndcg@10"], "tables": [table]}


def test_a_board_that_knows_little_is_shown_too(session: Chrome, tmp_path: Path) -> None:
    write_page(bare_board(), tmp_path / "bare.html")
    with visit(session, (tmp_path / "bare.html").as_uri()):
        assert names(session) == ["FM"]
        assert not session.find_element(By.ID, "cost").is_displayed()
        assert "quality against cost" in session.find_element(By.ID, "left-out").text
        assert "no commit" in session.find_element(By.ID, "facts").text


def test_a_table_of_failures_only_says_so(session: Chrome, tmp_path: Path) -> None:
    empty = bare_board()
    empty["tables"][0]["rows"][0] |= {"metrics": {}, "failed": [{"seed": 1, "reason": "out of memory"}]}
    write_page(empty, tmp_path / "empty.html")
    session.get("about:blank")
    browser.console(session)
    session.get((tmp_path / "empty.html").as_uri())
    until(session, lambda: "FM failed, seed 1: out of memory" in session.find_element(By.ID, "without").text)
    assert "No row has figures" in session.find_element(By.ID, "status").text
    assert browser.console(session) == []


def test_it_fits_a_phone(session: Chrome, place: str) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        with visit(session, place):
            until(session, lambda: cells(session, "#valid-plot .legendtext"))
            assert session.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        session.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# --- a browser that is missing ---------------------------------------------------------------------------------------
THERE = browser.Browser("/usr/bin/chromium", "/usr/bin/chromedriver")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine without a browser, where apt-get works for root; ``commands`` are those that were run."""
    state = SimpleNamespace(commands=[], installed=False, apt=True, root=True, sudo=None, fails=None)

    def which(name: str) -> str | None:
        if name in ("apt-get", "sudo"):
            return f"/usr/bin/{name}" if (state.apt if name == "apt-get" else state.sudo is not None) else None
        return f"/usr/bin/{name}" if state.installed and name in ("chromium", "chromedriver") else None

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        state.commands.append(" ".join(command))
        if command == ["sudo", "-n", "true"]:
            return subprocess.CompletedProcess(command, 0 if state.sudo else 1, "", "")
        if state.fails in command:
            return subprocess.CompletedProcess(command, 100, "", "first\nE: no network\n")
        state.installed = state.installed or "install" in command
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(browser.shutil, "which", which)
    monkeypatch.setattr(browser.subprocess, "run", run)
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0 if state.root else 1000)
    monkeypatch.setattr(browser.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    return state


def test_a_browser_that_is_there_is_taken(machine: SimpleNamespace) -> None:
    machine.installed = True
    assert browser.need() == THERE
    assert machine.commands == []


@pytest.mark.parametrize("root", [True, False])
def test_a_missing_browser_is_installed(machine: SimpleNamespace, root: bool) -> None:
    machine.root, machine.sudo = root, True
    assert browser.need() == THERE
    before = "" if root else "sudo -n "
    update, install = [command for command in machine.commands if "apt-get" in command]
    assert update.startswith(f"{before}env DEBIAN_FRONTEND=noninteractive apt-get") and update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends chromium chromium-driver")


HINDRANCES = {
    "there is no apt-get": {"apt": False},
    "needs root or sudo": {"root": False},
    "sudo without a password": {"root": False, "sudo": False},
    "apt-get update failed: E: no network": {"fails": "update"},
    "apt-get install failed: E: no network": {"fails": "install"},
}


@pytest.mark.parametrize(("reason", "hindrance"), HINDRANCES.items(), ids=list(HINDRANCES))
@pytest.mark.parametrize("ci", [True, False], ids=["ci", "own machine"])
def test_where_it_cannot_be_installed_ci_fails_and_others_are_told(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, reason: str, hindrance: dict[str, Any], ci: bool
) -> None:
    vars(machine).update(hindrance)
    if ci:
        monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception if ci else pytest.skip.Exception) as raised:
        browser.need()
    assert reason in str(raised.value) and browser.COMMAND in str(raised.value)


def test_packages_that_bring_no_browser_are_a_failure(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "install", lambda: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="still not to be found"):
        browser.need()
