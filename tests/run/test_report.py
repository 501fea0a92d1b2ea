import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from run_folders import GROUPS, h2tune_arrays, lora_arrays, save_arrays, write_run

from h2tune_jax.run import numbers
from h2tune_jax.run.disk import Gone
from h2tune_jax.run.folder import RunFolder, lock_folder
from h2tune_jax.run.report import arrays as inside
from h2tune_jax.run.report import write_report
from h2tune_jax.run.report.view import curve, read_view, read_views
from h2tune_jax.types import FederationError


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, tables and text."""

    VOID = ("meta", "br", "hr", "link")

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.tables, self.headings = [], [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] += data


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    folders = [
        write_run(root / "h2tune", moments=("trained", "downloaded")),
        write_run(root / "local", method="local", gain=0.2),
    ]
    save_arrays(folders[0], h2tune_arrays())
    save_arrays(folders[1], lora_arrays())
    return folders


def test_report_of_a_run_against_the_baseline(two):
    out = write_report(two)
    assert out == two[0] / "report.html"
    page = Page(out)
    assert page.headings[:4] == ["Summary", "Comparison", "Over rounds", "After local training"]
    for title in ("Layer relations", "Selected entries of the middle matrices", "Bytes and time",
                  "Config", "Environment", "Inside h2tune", "Inside local"):  # fmt: skip
        assert title in page.headings
    # Every link of the contents leads somewhere.
    links = re.findall(r'href="#([^"]+)"', page.text)
    assert len(links) == 9
    assert set(links) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_numbers_in_the_tables_are_those_of_the_records(two, tmp_path):
    page = Page(write_report(two, tmp_path / "x.html"))
    records = [read_view(folder).records for folder in two]
    summary = page.tables[0]
    assert summary[0] == ["group", "h2tune", "local", "majority class", "task", "clients", "rank"]
    for row, (group, task, majority, count, rank) in zip(summary[1:], GROUPS, strict=True):
        means = [
            np.mean(lines[-1]["evaluation"]["trained"][group]["accuracy"]) for lines in records
        ]
        shown = [f"{100 * value:.1f} %" for value in (*means, majority)]
        assert row == [group, *shown, task, str(count), str(rank)]
    clients = next(t for t in page.tables if t[0][0] == "client" and "task" in t[0])
    assert [row[0] for row in clients[1:]] == [
        f"{g}/{i}" for g, _, _, n, _ in GROUPS for i in range(n)
    ]
    last = records[1][-1]["evaluation"]["trained"]["smol"]["accuracy"][2]
    assert clients[-1][clients[0].index("local")] == f"{100 * last:.1f} %"
    cost = next(t for t in page.tables if "uploaded" in t[0])
    assert cost[1][2] == numbers.size(sum(line["bytes_up"] for line in records[0]))
    assert cost[2][2] == "0 B"


def test_page_asks_nobody_for_anything(two, tmp_path):
    text = write_report(two, tmp_path / "x.html").read_text()
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_everything_is_escaped(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    groups = ((bad.replace('"', ""), bad, 0.3, 2, 4),)
    folder = write_run(tmp_path / "run", name=bad, method=bad, groups=groups)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, bad: bad, "device": bad}))
    (folder / "config.toml").write_text((folder / "config.toml").read_text() + f"# {bad}\n")
    text = write_report(folder).read_text()
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror") > 10
    Page(folder / "report.html")


def test_missing_parts_are_said(tmp_path):
    folder = write_run(tmp_path / "run", method="local", known=False)
    text = write_report(folder).read_text()
    assert "the run has no checkpoints" in text
    assert "most frequent class is not known" in text
    assert "<h3>Layer relations</h3>" not in text
    save_arrays(folder, {".round": np.asarray(3)})
    text = write_report(folder).read_text()
    assert "keeps no layer relations" in text
    assert "keep no low-rank factors" in text


def test_damaged_checkpoints_are_said(tmp_path):
    folder = write_run(tmp_path / "run")
    save_arrays(folder, h2tune_arrays())
    (folder / "checkpoints" / "000006" / "manifest.json").write_text("{")
    assert "no checkpoint can be read" in write_report(folder).read_text()


def test_run_without_rounds_or_evaluation(tmp_path):
    folder = write_run(tmp_path / "none", rounds=0)
    assert "has been evaluated" in write_report(folder).read_text()
    folder = write_run(tmp_path / "train", moments=())
    text = write_report(folder).read_text()
    assert "has been evaluated" in text
    assert "Bytes and time" in text


def test_a_line_that_is_still_being_written(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "coh')
    assert len(read_view(folder).records) == 6
    write_report(folder)


def test_a_run_under_way_and_a_damaged_log_are_said(tmp_path):
    folder = write_run(tmp_path / "run", method="local")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with lock_folder(RunFolder(folder)):
        assert "Rounds done: 6 of 6, still running." in write_report(folder).read_text()
    (folder / "metrics.jsonl").write_bytes(
        b"".join([*lines[:2], lines[2][:9] + b"\0\n", *lines[3:]])
    )
    text = write_report(folder).read_text()
    assert "Rounds done: 2 of 6." in text
    assert "local: line 3 of metrics.jsonl is damaged, and what follows is left out." in text


def test_values_that_are_null(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2)
    records = read_view(folder).records
    for record in records:
        record["evaluation"]["trained"]["minilm"]["accuracy"] = [None, 0.5]
        record["evaluation"]["trained"]["short"]["accuracy"] = [None, None]
        record["cohorts"]["short"]["loss"] = [None]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = curve(read_view(folder), "minilm", "accuracy", "trained")
    np.testing.assert_array_equal(found.mean, [0.5, 0.5])
    np.testing.assert_array_equal(found.rounds, [1, 2])
    page = Page(write_report(folder))
    assert [row[1] for row in page.tables[0][1:3]] == ["50.0 %", "–"]


def test_seeds_are_averaged_and_compared(tmp_path):
    folders = [
        write_run(tmp_path / method / str(seed), method=method, seed=seed, gain=gain)
        for method, gain in (("h2tune", 0.3), ("local", 0.2))
        for seed in range(3)
    ]
    views = read_views(folders)
    assert [view.label for view in views][:2] == ["h2tune, seed 0", "h2tune, seed 1"]
    page = Page(write_report(folders, tmp_path / "x.html"))
    assert page.tables[0][0][1:3] == ["h2tune", "local"]
    means = [curve(v, "minilm", "accuracy", "trained").mean[-1] for v in views]
    assert page.tables[0][1][1] == f"{100 * np.mean(means[:3]):.1f} %"
    compared = next(t for t in page.tables if "95 % interval" in t[0])
    gaps = 100 * (np.array(means[:3]) - means[3:])
    assert compared[1][3] == f"{gaps.mean():+.1f}"
    reach = 4.302652729911275 * gaps.std(ddof=1) / 3**0.5
    ends = [f"{gaps.mean() + sign * reach:+.1f}".replace("-", "−") for sign in (-1, 1)]
    assert compared[1][4] == " to ".join(ends)


def test_runs_of_one_method_and_seed_stay_apart(tmp_path):
    folders = [
        write_run(tmp_path / "a", name="wide", gain=0.3),
        write_run(tmp_path / "b", name="narrow", gain=0.1),
        write_run(tmp_path / "c", name="alone", method="local", gain=0.2),
    ]
    page = Page(write_report(folders))
    names = ["wide, h2tune, seed 0", "narrow, h2tune, seed 0", "alone, local, seed 0"]
    assert page.tables[0][0][1:4] == names
    compared = next(t for t in page.tables if "95 % interval" in t[0])
    assert compared[0][3] == "minus alone, local, seed 0"
    assert [row[1] for row in compared[1:4]] == names
    assert [row[3][0] for row in compared[1:4]] == ["+", "−", "–"]


def test_seeds_of_one_method_are_not_compared(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    assert "Comparison" not in Page(write_report(folders)).headings


def test_ten_thousand_clients_stay_small(tmp_path):
    groups = (("many", "trec", 0.24, 10_000, 8), ("few", "trec", 0.24, 50, 8))
    folder = write_run(tmp_path / "run", groups=groups, rounds=3)
    out = write_report(folder)
    assert out.stat().st_size < 100_000
    page = Page(out)
    quantiles = next(t for t in page.tables if "median" in t[0])
    values = curve(read_view(folder), "many", "accuracy", "trained").values[-1]
    assert quantiles[1][2] == "10,000"
    assert quantiles[1][5] == f"{100 * np.median(values):.1f} %"
    assert "By task, after local training" in page.headings


def test_many_rounds_stay_small(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2000)
    assert write_report(folder).stat().st_size < 200_000


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FederationError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(FederationError, match="at least one"):
        write_report([])


def test_a_report_that_cannot_be_written(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FederationError, match=r"the report cannot be written to .*choose another"):
        write_report(two, tmp_path / "file" / "report.html")


def test_selected_share_by_hand():
    active = np.array([[[[0, 1]], [[1, 2]]], [[[1, 3]], [[1, 2]]]])  # [C=2, Li=2, Ki=1, 2]
    found = inside.Relations(
        kinds=("q",), relation=np.zeros((2, 1, 2)), active=active,
        middle=np.zeros((2, 2, 1, 2, 2)), trained=np.ones(2, bool),
    )  # fmt: skip
    share = inside.selected_share(found, np.array([0, 1]))
    np.testing.assert_allclose(share, [[[0.25, 1.0], [0.5, 0.25]]])
    np.testing.assert_allclose(
        inside.selected_share(found, np.array([1])), [[[0, 1.0], [0.5, 0.5]]]
    )


def test_matrices_are_read_back_to_the_slots():
    from h2tune_jax.adapters import relation

    found = inside.relations_of(inside.by_tokens(h2tune_arrays()), 2)
    slots = inside.read_back(found, 1)
    expected = relation.unmix(found.relation[1], found.middle[1])
    assert list(slots) == ["q", "v", "up"]
    for place, kind in enumerate(slots):
        np.testing.assert_allclose(slots[kind], expected[:, place], rtol=1e-4, atol=1e-5)


def test_updates_are_compared_as_products():
    arrays = inside.by_tokens(lora_arrays())
    first, second, last = (inside.factors_of(arrays, place) for place in range(3))
    assert not inside.comparable(first, second)
    assert inside.comparable(first, last)
    whole = lambda f, i: np.einsum("ldr,lrf->ldf", f["q"].a[i], f["q"].b[i])
    expected = np.vdot(whole(first, 0), whole(last, 2))
    assert inside.update_products(first, 0, last, 2) == pytest.approx(expected, rel=1e-4)


def test_cosine_of_slots_by_hand():
    one = {"q": np.array([3.0, 4.0]), "v": np.array([9.0])}
    assert inside.cosine_of_slots(one, {"q": np.array([4.0, 3.0])}) == pytest.approx(24 / 25)
    assert np.isnan(inside.cosine_of_slots(one, {"up": np.array([1.0])}))
    assert np.isnan(inside.cosine_of_slots(one, {"q": np.zeros(2)}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.share(0.8123), "81.2 %"),
        (numbers.share(float("nan")), "–"),
        (numbers.difference_of("accuracy", -0.0123), "−1.2"),
        (numbers.difference_of("loss", 0.5), "+0.5"),
        (numbers.size(0), "0 B"),
        (numbers.size(58_000_000_000), "58 GB"),
        (numbers.duration(0.345), "0.34 s"),
        (numbers.duration(59.9), "1 min 00 s"),
        (numbers.duration(185), "3 min 05 s"),
        (numbers.duration(7860), "2 h 11 min"),
        (numbers.duration(None), "–"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


def test_evaluations_of_some_clients_find_their_places(tmp_path):
    folder = write_run(tmp_path / "run", rounds=2)
    records = read_view(folder).records
    own = lambda ids, values: {"clients": ids, "accuracy": values}
    records[0]["evaluation"] = {"trained": {"smol": own([2], [0.5])}}
    records[1]["evaluation"] = {
        "trained": {"smol": own([0, 2], [0.25, 0.75])},
        "newcomers": {"smol": own([1], [0.125])},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = curve(read_view(folder), "smol", "accuracy", "trained")
    np.testing.assert_array_equal(found.clients, [0, 2])
    np.testing.assert_array_equal(found.values, [[np.nan, 0.5], [0.25, 0.75]])
    page = Page(write_report(folder))
    clients = next(t for t in page.tables if t[0][0] == "client")
    assert [row[1] for row in clients[-3:]] == ["25.0 %", "–", "75.0 %"]
    assert "Newcomers, after their stated number of steps" in page.headings
    assert "<title>h2tune: smol/2</title>" in page.text


def test_clients_in_a_store_of_rows_are_sampled(tmp_path, monkeypatch):
    """A checkpoint of the store "file", written with its own parts: 100 of 200 clients have trained."""
    from h2tune_jax.run import row_store, write_checkpoint
    from h2tune_jax.run.rows import Location, Segments, index_array, layout_of, pack

    groups = (("many", "trec", 0.24, 200, 4),)
    folder = RunFolder(write_run(tmp_path / "run", groups=groups, rounds=2))
    rng = np.random.default_rng(0)
    rows = {
        "a": {"q": rng.normal(size=(100, 2, 6, 4))},
        "b": {"q": rng.normal(size=(100, 2, 4, 6))},
    }
    layout = layout_of({k: {"q": v["q"][0]} for k, v in rows.items()})
    segments = Segments(folder.clients, 0, layout.row_bytes)
    number = segments.write(pack(layout, 100, rows))
    index = {2 * place: Location(number, place) for place in range(100)}
    meta = {"store": "file", "layouts": [layout.describe()], "segments": [{}]}
    beside = {segments.name(number): segments.marks[number]}
    save = lambda step: write_checkpoint.save(
        folder, step, {".index[0]": index_array(index)}, meta, beside
    )
    save(2)

    found = inside.read_inside(folder.path, 1)
    assert found.is_sample
    assert (found.clients[0][0], found.clients[0][-1], len(found.clients[0])) == (0, 198, 64)
    np.testing.assert_array_equal(
        found.arrays["clients", "0", "a", "q"], rows["a"]["q"][found.clients[0] // 2]
    )
    text = write_report(folder.path).read_text()
    assert "at most 64" in text
    assert "24 of 200 clients" in text
    assert "23: many/198" in text

    # A run under way: the rows have moved when its checkpoint has been read.
    real, asked = row_store.clients_of, []

    def move_on(*args):
        if not asked:
            asked.append(True)
            Segments(folder.clients, 0, layout.row_bytes).keep(set())
            with pytest.raises(Gone, match="no longer there: its run has gone on"):
                real(*args)
            segments.write(pack(layout, 100, rows))
            index.update({2 * place: Location(1, place) for place in range(100)})
            beside.clear()
            save(3)
            write_checkpoint.prune(folder, [3])
        return real(*args)

    monkeypatch.setattr(row_store, "clients_of", move_on)
    assert inside.read_inside(folder.path, 1).rounds == 3
