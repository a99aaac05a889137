"""README.md and docs/ are true: the code, files, settings and links that they name exist."""
import json
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(title, text=README):
    """The text of a page under a heading."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def paragraphs(text):
    """Paragraphs and list items, without code, tables and headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = ["" if re.match(r" {4}|\||#|!\[|<!--", line) else line for line in text.splitlines()]
    return [p for p in re.split(r"\n\s*\n|\n(?=- |\d\. )", "\n".join(lines)) if p.strip()]


def test_quoted_code_stands_in_the_file_it_is_said_to_stand_in():
    rows = [row for row in section("The equations, in the code").splitlines() if " in `" in row]
    assert len(rows) >= 12
    for row in rows:
        for part in re.split(r"(?<=\.py`)", row.split(" | ", 1)[1]):
            file = re.search(r" in `([\w/]+\.py)`$", part)
            for code in re.findall(r"`([^`]+)`", part[:file.start()]) if file else []:
                assert code in (ROOT / file[1]).read_text(), (code, file[1])


def test_every_equation_of_the_paper_has_a_row():
    equations = section("The equations, in the code")
    for number in range(1, 11):
        assert re.search(rf"\({number}[,)]|, {number}\)", equations), number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`([\w./]+\.(?:py|md|json|txt|png|npz))`", page.read_text()):
        places = (ROOT / folder / name for folder in ("", "config", "docs", "results"))
        assert any(place.exists() for place in places) or is_written_by_a_run(name), name


def is_written_by_a_run(name):
    """Whether a user's own command makes this file."""
    written = {"public.json", "server.npz", "embedding.npz", "entropy.png"}
    return name.startswith("out/") or name in written


def test_every_architecture_is_named():
    named = set(re.findall(r"`((?:sm|ereg)_\w+|sm)`", section("Architectures and settings")))
    assert named == {path.stem for path in (ROOT / "config").glob("*.py")
                     if not path.stem.startswith("on_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_settings_that_exist(page):
    for script, arguments in re.findall(r"python ([\w/]+\.py)([^\n`#&]*)", page.read_text()):
        if script == "script.py":  # stands for any
            continue
        text = (ROOT / script).read_text()
        if script == "train.py":  # the fields of GPTConfig are settings of train.py
            text += (ROOT / "model.py").read_text()
        for key in re.findall(r"--(\w+)", arguments):
            assignment = rf"^(?:(?:\w+, )*{key}(?:, \w+)*|    {key}: \w+) += "
            assert key == "help" or re.search(assignment, text, re.M), (script, key)
        for config in re.findall(r"config/\w+\.py", arguments):
            assert (ROOT / config).exists(), config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in headings(other.read_text()), target


def headings(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len(README.splitlines()) <= 230


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paragraphs_are_short(page):
    most = 60 if page.name == "README.md" else 75
    for paragraph in paragraphs(page.read_text()):
        assert len(paragraph.split()) <= most or "Made by `python" in paragraph, paragraph


def results(table):
    """Rows of a table of results/reproduction.json that have runs."""
    rows = json.loads((ROOT / "results" / "reproduction.json").read_text())[table]
    return [row for row in rows if row["runs"]]


def cells_by_label(text):
    """{first cell: the others} of Markdown tables."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {label: cells for label, *cells in rows}


def test_perplexities_are_those_of_the_json():
    page = (ROOT / "docs/training.md").read_text()
    told = cells_by_label(section("At ten tokens a parameter", page).split("\n### ")[0])
    rows = results("architectures")
    runs = {row["label"]: [run["val_ppl"] for run in row["runs"]] for row in rows}
    assert set(runs) <= set(told)
    for label in runs:
        cells = told[label]
        mean = f"{sum(runs[label]) / len(runs[label]):.1f}"
        seeds = f" ({len(runs[label])} seeds)" if len(runs[label]) > 1 else ""
        assert mean + seeds in cells[:2], label
        over = 100 * (runs[label][0] / runs["SM+LN+G"][0] - 1)
        assert over == 0 or f"{over:+.1f}%" in cells[:3], label


def outcome(runs):
    """Perplexities by seed, and how many diverged, as the tables tell them."""
    done = ", ".join(f"{run['val_ppl']:.1f}" for run in runs if run["event"] == "done")
    diverged = sum(run["event"] == "diverged" for run in runs)
    parts = [done, f"{diverged} of {len(runs)} diverged"]
    return "; ".join(part for part in parts if part and not part.startswith("0 "))


@pytest.mark.parametrize("page, title", [("README.md", "Results"),
                                         ("docs/training.md", "At the paper's width and depth")])
def test_outcomes_at_the_papers_size_are_those_of_the_json(page, title):
    told = cells_by_label(section(title, (ROOT / page).read_text()))
    checked = 0
    for row in results("paper_size"):
        if row["label"] in told and row["flags"]["learning_rate"] == 1e-3:
            assert told[row["label"]][0] == outcome(row["runs"]), row["label"]
            checked += 1
    assert checked >= 8


def test_private_costs_are_those_of_the_json():
    table = section("Private inference")
    for run in json.loads((ROOT / "results" / "private_table2.json").read_text()):
        assert f" {run['bytes_total'] / 1e6:,.0f} " in table, run["arch"]
        assert f" {run['seconds'] / 60:.1f} " in table, run["arch"]


def by_cell(name, *fields):
    """{(the row's label, *fields of its cell): rows} of the seeds that are reported."""
    found = {}
    for row in json.loads((ROOT / "results" / name).read_text())["rows"]:
        cell = row["cell"] | row["cell"]["size"] | row["cell"]["flags"]
        if cell["seed"] > 1:  # with 1 the rate was chosen
            found.setdefault(tuple(cell[field] for field in ("label", *fields)), []).append(row)
    return found


def told_range(values, form="{:.2f}"):
    ends = dict.fromkeys(form.format(end) for end in (min(values), max(values)))
    return " to ".join(ends)


def table_of(header):
    """{first cell: the others} of the table of docs/open-questions.md that begins so."""
    page = (ROOT / "docs" / "open-questions.md").read_text()
    return cells_by_label(page.split(f"\n{header}")[1].split("\n\n")[0])


def test_arithmetic_is_that_of_the_json():
    rows = by_cell("arithmetic.json", "task")
    names = {label: label for label, _ in rows} | {
        "0.2, learned": "EReg threshold 0.2", "0.2, frozen": "EReg frozen at 0.2",
        "0.5, learned (EReg above)": "EReg(SM(t)+ScFuFFN)", "0.5, frozen": "EReg frozen at 0.5",
        "0.8, learned": "EReg threshold 0.8", "0.8, frozen": "EReg frozen at 0.8",
        "no regularizer: SM(t)+ScFuFFN": "SM(t)+ScFuFFN"}
    told = table_of("| exact match") | table_of("| EReg's thresholds")
    told = {label: cells for label, cells in told.items() if label in names}
    assert len(told) == 15
    for label, (first, *others) in told.items():
        mine = {task: rows[names[label], task] for task in ("add3r", "add3", "mul2r")}
        steps = told_range([row["history"][-1][0] for row in mine["add3r"]], "{:.0f}")
        assert first.endswith(steps) and len(mine["mul2r"]) == 3, label
        for task, cell in zip(("add3", "mul2r"), others):
            assert cell == told_range([row["score"] for row in mine[task]]), (label, task)


def test_edges_are_those_of_the_json():
    rows = by_cell("edge.json", "n_layer", "n_embd", "seed")
    told = table_of("| edge | 4x128 | 6x64 | 6x128 | 6x256 | 6x512 | 12x128 | 24x128 |")
    sizes = [(4, 128), (6, 64), (6, 128), (6, 256), (6, 512), (12, 128), (24, 128)]
    for label in {label for label, *_ in rows}:
        for size, cell in zip(sizes, told[label], strict=True):
            edges = [edge_of(mine) for key, mine in rows.items() if key[:3] == (label, *size)]
            assert cell == told_range(edges, "{:g}"), (label, size)


def edge_of(rows):
    """One seed's lowest rate above its best that ends without a finite loss, or 0.5 nats above."""
    rows = sorted(rows, key=lambda row: row["cell"]["flags"]["learning_rate"])
    loss = [row["history"][-1][1] if row["event"] == "done" else float("inf") for row in rows]
    best = loss.index(min(loss))
    return next(row["cell"]["flags"]["learning_rate"] for row, lost in
                zip(rows[best:], loss[best:]) if lost > min(loss) + 0.5)
