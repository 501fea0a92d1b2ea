"""The documented examples run and do what they say."""

import ast
import csv
import importlib.util
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
import toy

import h2tune_jax as h2

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_strangers_model_federates(capsys):
    example = load(ROOT / "experiments/bring_your_own_model/federate.py")
    accuracy = example.main(rounds=6)
    # Chance is a third and a quarter.
    assert accuracy["h2tune"]["narrow"] > 0.5
    assert accuracy["h2tune"]["wide"] > 0.4
    assert "numbers sent up a client {'narrow': 96, 'wide': 640}" in capsys.readouterr().out


def code_of(page):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return code


def test_the_readme_shows_a_federation_that_learns(capsys):
    exec(compile(code_of("README.md"), "README.md", "exec"), {})
    first, *_, last = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert first.keys() == last.keys() == {"small", "large"}
    assert all(last[name] < first[name] for name in first)


def block_of(page, word):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if word in block)
    return compile(code, page, "exec")


def test_the_api_page_maps_rounds_over_states():
    code = block_of("docs/api.md", "jax.vmap(round_fn")
    specs, bases, data = toy.make_specs(), toy.make_bases(), toy.make_data(toy.make_specs())
    method = h2.h2tune()
    names = {"h2": h2, "jax": jax, "jnp": jnp, "method": method, "specs": specs, "bases": bases}
    names |= {"data": data, "round_fn": h2.make_round(method, specs)}

    def two_rounds():
        exec(code, names)
        states, metrics = names["states"], names["metrics"]
        seeds = jnp.arange(8)
        states, _ = names["many"](states, bases, data, None, None, method.hyper, seeds)
        return states, metrics

    states, metrics = jax.eval_shape(two_rounds)  # traced, not run
    assert states.round.shape == ()
    assert metrics.clients["wide"]["loss"].shape == (8, specs[1].num_clients)


def test_the_api_page_takes_a_config_apart(tmp_path, monkeypatch):
    tiny_run.write_run(tmp_path).rename(tmp_path / "h2tune.toml")
    monkeypatch.chdir(tmp_path)
    code = block_of("docs/api.md", "build_federation(config)")
    names = {"h2": h2, "jax": jax, "jnp": jnp}

    def one_round():
        exec(code, names)
        return names["metrics"]

    metrics = jax.eval_shape(one_round)
    assert metrics.clients["narrow"]["loss"].shape == (2,)
    assert metrics.clients["wide"]["loss"].shape == (3,)


def test_the_methods_page_shows_a_method_that_runs():
    code = code_of("docs/methods.md")
    assert len(code.splitlines()) < 65
    names = {}
    exec(compile(code, "docs/methods.md", "exec"), names)
    plain = names["shared_head"](learning_rate=0.02)
    wrapped = h2.server_optimizer(h2.proximal(plain, 0.1), optax.sgd(1.0))
    specs, bases, data = toy.make_specs()[1:], toy.make_bases()[1:], toy.make_data(toy.make_specs())
    for method in (plain, wrapped):
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn, losses = h2.make_round(method, specs), []
        for _ in range(6):
            state, metrics = round_fn(state, bases, data[1:], None, None, method.hyper, toy.SEED)
            losses.append(metrics.clients["wide"]["loss"].mean())
        assert losses[-1] < 0.9 * losses[0]
        assert metrics.rejected == {"wide": 0}
        np.testing.assert_array_equal(metrics.clients["wide"]["numbers_up"], 12 * 2)
        server = state.server if method is plain else state.server.inner
        heads = state.clients[0].params["head"]
        # All three clients count alike, and a rate of 1 is the mean itself.
        np.testing.assert_allclose(server.heads["wide"], heads.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_the_methods_page_lists_every_method():
    page = (ROOT / "docs/methods.md").read_text()
    files = {path.stem for path in (ROOT / "h2tune_jax/methods").iterdir()}
    methods = files & set(h2.__all__)
    assert len(methods) >= 12
    for name in methods:
        assert f"| `{name}` |" in page or f"`{name}`," in page or f"h2.{name}(" in page, name


def load_bench_of_methods(monkeypatch):
    folder = ROOT / "experiments/real_3x3"
    monkeypatch.syspath_prepend(str(folder))
    return load(folder / "bench.py"), load(folder / "report.py")


@pytest.mark.slow
def test_the_bench_of_methods_has_every_kind_of_setting(tmp_path, monkeypatch):
    bench, report = load_bench_of_methods(monkeypatch)
    bench.main(["--smoke", "--out", str(tmp_path)])
    page = report.page_of(bench.plan.smoke(tmp_path), tmp_path)
    assert "What it cost" in page
    assert "Not run yet" not in page
    assert (tmp_path / "curve-rank.svg").is_file()
    assert {line["row"] for line in bench.read(tmp_path / "rank4.csv")} == {"local", "h2tune"}
    lines = bench.read(tmp_path / "newcomers.csv")
    # What shares is tested at the rate of what shares nothing, too, and the other way round.
    at = lambda row: {x["rate"] for x in lines if (x["row"], x["split"]) == (row, "test")}
    assert at("h2tune") == at("h2tune_alone")
    assert "What sharing itself adds, paired by seed: " in page
    newcomers = [line for line in lines if line["split"] == "newcomer"]
    assert {line["client"] for line in newcomers} == {"tiny-words/2"}
    assert {line["client"] for line in lines if line not in newcomers} == {
        "tiny-words/0",
        "tiny-words/1",
    }


def test_the_method_of_every_row_of_the_plan_can_be_built(monkeypatch, capsys):
    bench, _ = load_bench_of_methods(monkeypatch)
    bench.main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{listed}" for name in bench.plan.SETTINGS)


def test_a_grid_goes_on_while_the_best_rate_is_at_its_end(monkeypatch):
    bench, _ = load_bench_of_methods(monkeypatch)
    found = {3e-4: 0.5, 1e-3: 0.6}
    line = {"row": "local", "split": "validation", "refused": 0}
    lines = lambda: [{**line, "rate": rate, "accuracy": value} for rate, value in found.items()]
    rates = (3e-4, 1e-3, 3e-3)
    assert bench.grid_of(lines(), "local", rates) == rates
    with pytest.raises(bench.RateUnknown, match=r"at rate 0\.003"):
        bench.chosen_rate(lines(), "local", rates)
    found[3e-3] = 0.7
    with pytest.raises(bench.RateUnknown, match=r"at rate 0\.01"):
        bench.chosen_rate(lines(), "local", rates)
    assert bench.grid_of(lines(), "local", rates) == (*rates, 1e-2)
    found[1e-2] = 0.65
    found[1e-4] = 0.9  # beside the grid: nobody asked for it
    assert bench.grid_of(lines(), "local", rates) == (*rates, 1e-2)
    assert bench.chosen_rate(lines(), "local", rates) == 3e-3
    found[3e-4] = 0.8
    assert bench.chosen_rate(lines(), "local", rates) == 1e-4
    found[1e-2] = 1.0  # of no grid any more
    assert bench.chosen_rate(lines(), "local", rates) == 1e-4


def test_who_is_alone_may_have_a_rate_for_every_task(tmp_path, monkeypatch):
    bench, report = load_bench_of_methods(monkeypatch)
    record, setting = sys.modules["record"], bench.plan.smoke(tmp_path)["smoke"]
    plan = sys.modules["plan_types"].fingerprint(setting, setting.rows["local"])
    # By rate: what the clients of two tasks have on validation rows, and on test rows.
    validated = {1e-4: (0.3, 0.4), 3e-4: (0.5, 0.8), 1e-3: (0.6, 0.6), 3e-3: (0.4, 0.5)}
    tested = {3e-4: (0.51, 0.81), 1e-3: (0.61, 0.61)}

    def lines(rate, seed, split, values):
        whole = dict.fromkeys(record.COLUMNS, 0)
        run = {"setting": setting.name, "row": "local", "plan": plan, "rate": rate, "seed": seed}
        clients = zip(("m-one/0", "m-two/0"), values)
        about = {"split": split, "round": 2, "device": "x", "jax": "x"}
        return [whole | run | about | {"client": c, "accuracy": value} for c, value in clients]

    path = record.path_of(setting.name, tmp_path)
    for rate, values in validated.items():
        record.append(path, lines(rate, 100, "validation", values))
    row = setting.rows["local_by_task"]
    wanted = record.planned(setting, "local_by_task", row, "test", tmp_path)
    assert {(run.row, run.rate) for run in wanted} == {("local", 1e-3), ("local", 3e-4)}
    for rate, values in tested.items():
        record.append(path, lines(rate, 0, "test", values))
    settings = {setting.name: setting}
    found = report.found_of(setting, record.measured(setting, settings, tmp_path))
    means = {row.name: (row.rates, row.mean) for row in found}
    assert means["local"] == ((3e-4,), pytest.approx((0.51 + 0.81) / 2))
    assert means["local_by_task"] == ((3e-4, 1e-3), pytest.approx((0.61 + 0.81) / 2))


def test_rows_may_be_tested_at_each_others_rates(tmp_path, monkeypatch):
    bench, _ = load_bench_of_methods(monkeypatch)
    record, settings = sys.modules["record"], bench.plan.smoke(tmp_path)
    setting, fingerprint = settings["newcomers"], sys.modules["plan_types"].fingerprint
    best = {"local": 1e-3, "h2tune": 1e-3, "h2tune_alone": 3e-3}
    built = []

    def fake_lines(setting, programs, federation, run):
        about = {
            "setting": setting.name, "plan": fingerprint(setting, setting.rows[run.row]),
            "client": "tiny-words/0", "accuracy": -abs(np.log(run.rate / best[run.row])),
            "seconds": 1, "device": "x", "jax": "x", **run._asdict(),
        }  # fmt: skip
        return [dict.fromkeys(record.COLUMNS, 0) | about]

    def fake_federation(setting, row, seed, bases):
        built.append((seed, row.probe))
        return types.SimpleNamespace(bases=(), specs=())

    monkeypatch.setattr(bench, "lines_of", fake_lines)
    monkeypatch.setattr(bench, "federation_of", fake_federation)
    monkeypatch.setattr(bench, "specs_of", lambda row, specs: ())
    monkeypatch.setattr(bench, "programs_of", lambda setting, row, specs: ())
    fake_method = types.SimpleNamespace(check=lambda specs: None)
    monkeypatch.setattr(bench, "method_of", lambda row: fake_method)
    bench.bench(setting, setting.rows, tmp_path)
    lines = bench.read(record.path_of(setting.name, tmp_path))
    at = lambda row: {x["rate"] for x in lines if (x["row"], x["split"]) == (row, "test")}
    assert at("local") == {1e-3}
    assert at("h2tune") == at("h2tune_alone") == {1e-3, 3e-3}
    assert bench.progress(setting, setting.rows, tmp_path).finished == len(lines)

    # Rows of other public texts have federations of their own.
    count = lambda n: {"data": "words.jsonl", "count": n, "max_length": 4}
    rows = {f"local_{n}": setting.rows["local"]._replace(probe=count(n)) for n in (8, 16)}
    best |= dict.fromkeys(rows, 1e-3)
    built.clear()
    bench.bench(setting._replace(name="probes", rows=rows), rows, tmp_path)
    assert {(seed, probe["count"]) for seed, probe in built} == {
        (seed, n) for seed in (*setting.seeds, *setting.grid_seeds) for n in (8, 16)
    }


@pytest.mark.slow
def test_what_a_row_trains_is_counted(tmp_path, monkeypatch):
    bench, _ = load_bench_of_methods(monkeypatch)
    costs = load(ROOT / "experiments/real_3x3/costs.py")
    # A ledger beside the base, which flora has, is not trained by clients.
    smoke = bench.plan.smoke(tmp_path)
    rows = smoke["smoke"].rows | {"flora": bench.plan.ROWS["flora"]}
    monkeypatch.setattr(
        bench.plan, "smoke", lambda out: smoke | {"smoke": smoke["smoke"]._replace(rows=rows)}
    )
    for _ in range(2):  # what is there is not done again
        costs.main(["smoke", "--smoke", "--out", str(tmp_path)])
    lines = list(csv.DictReader((tmp_path / "costs.csv").read_text().splitlines()))
    trained = {line["row"]: float(line["trained"]) for line in lines}
    assert len(lines) == len(trained) == 4
    # Two layers of r (D + F) on q and up, and a head on the width for two labels.
    plain = 2 * 2 * ((8 + 8) + (8 + 12)) + 8 * 2 + 2
    assert trained["local"] == trained["fedit"] == trained["flora"] == plain
    # The core of 2 x 2 entries a site, too.
    assert trained["h2tune"] == plain + 2 * 2 * 4
    assert all(int(line["planned_bytes"]) > 0 for line in lines)


def test_the_form_of_the_bench_is_the_preset(monkeypatch):
    bench, _ = load_bench_of_methods(monkeypatch)
    form = {k: None if v == "none" else v for k, v in bench.plan.COMMON_BASIS.items()}
    assert {name: getattr(h2.COMMON, name) for name in form} == form
    starts = bench.plan.ROWS["h2tune_common"].options
    built = bench.method_of(bench.plan.ROWS["h2tune_common"]).hyper
    assert starts["head_rate"] == h2.COMMON.head_rate
    assert built == h2.COMMON.hyper()


QUOTED = (
    # Where texts speak of the bench: from a heading to the next one of its level, or to the tables.
    ("experiments/real_3x3/README.md", r"\n## What wins.*?(?=\n## )"),
    ("README.md", r"\n## What it is worth.*?(?=\n## )"),
    ("docs/h2tune.md", r"\n## The preset `COMMON`.*?(?=\n## )"),
)
INTERVAL = r"([+-]?\d+\.\d)(?: points)?,?\s*\(?([+-]?\d+\.\d)\s+to\s+([+-]?\d+\.\d)\)?"


def numbers_in(text):
    """The intervals and the percentages of a text: {(mean, low, high)}, {share}."""
    plain = text.replace("−", "-")
    intervals = {tuple(map(float, found)) for found in re.findall(INTERVAL, plain)}
    return intervals, {float(found) for found in re.findall(r"(\d+\.\d)\s%", plain)}


def test_what_texts_say_of_the_bench_stands_in_its_tables():
    """A number that is quoted is one that the rows give; the tables are made from them."""
    page = (ROOT / "experiments/real_3x3/README.md").read_text(encoding="utf-8")
    intervals, shares = numbers_in(page[page.index("<!-- results -->") :])
    for path, section in QUOTED:
        (text,) = re.findall(section, (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)
        quoted = numbers_in(text)
        assert quoted[0], path
        assert quoted[0] <= intervals, (path, quoted[0] - intervals)
        assert quoted[1] <= shares, (path, quoted[1] - shares)


def test_what_is_said_of_a_setting_stands_in_its_own_tables():
    page = (ROOT / "experiments/real_3x3/README.md").read_text(encoding="utf-8")
    text, results = page.split("<!-- results -->")
    tables, of_all = {}, ""
    for section in re.split(r"\n### ", results)[1:]:
        named = re.findall(r"\(`(\w+)`\)\n", section)
        if named:
            tables[named[0]] = section
        else:
            of_all += section  # curves
    (text,) = re.findall(QUOTED[0][1], text + "\n## ", flags=re.DOTALL)
    seen = set()
    for paragraph in re.split(r"\n\n(?=\*\*[A-Z])", text)[1:]:
        named = [name for name in re.findall(r"`(\w+)`", paragraph) if name in tables]
        intervals, shares = numbers_in(of_all + "".join(tables[name] for name in named))
        quoted = numbers_in(paragraph)
        assert quoted[0] <= intervals, (named, quoted[0] - intervals)
        assert quoted[1] <= shares, (named, quoted[1] - shares)
        seen |= set(named)
    assert seen >= {"both", "tasks", "models", "depths", "crowd", "ablation", "shards", "smollm2"}


def test_the_tables_of_the_bench_are_those_of_its_rows(tmp_path, monkeypatch):
    bench, report = load_bench_of_methods(monkeypatch)
    for rows in bench.RESULTS.glob("*.csv"):
        shutil.copy(rows, tmp_path)
    page = (ROOT / "experiments/real_3x3/README.md").read_text(encoding="utf-8")
    made = report.page_of(bench.plan.SETTINGS, tmp_path)
    assert page.split(report.START)[1].split(report.END)[0].strip() == made.strip()
    for picture in tmp_path.glob("*.svg"):
        assert picture.read_bytes() == (bench.RESULTS / picture.name).read_bytes(), picture.name


def test_the_bench_measures_rows_in_parts(tmp_path, monkeypatch):
    bench, _ = load_bench_of_methods(monkeypatch)
    setting, row = bench.plan.smoke(tmp_path)["smoke"], bench.plan.ROWS["local"]
    one_run = sys.modules["one_run"]
    federation = one_run.federation_of(setting, row, 0, None)
    programs = one_run.programs_of(setting, row, federation.specs)
    key = jax.random.key(0)
    state = h2.init_round(programs.method, programs.specs, federation.bases, None, key)
    args = programs, federation, state, federation.test, one_run.usual(programs), "trained"
    whole = one_run.measure(*args)
    monkeypatch.setattr(one_run, "TEST_ROWS", 3)
    toy.assert_trees_close(one_run.measure(*args), whole)


def test_the_bench_of_methods_runs_what_is_missing(tmp_path, monkeypatch):
    bench, report = load_bench_of_methods(monkeypatch)
    command = ["smoke", "--smoke", "--rows", "local,h2tune", "--out", str(tmp_path)]
    bench.main(command)
    path = tmp_path / "smoke.csv"
    lines = bench.read(path)
    rates = bench.plan.ROWS["h2tune"].rates
    # Two rows: every rate with one seed on validation (a grid may go on), then two seeds on test.
    grids = [bench.grid_of(lines, row, rates) for row in ("local", "h2tune")]
    num_runs = sum(len(grid) + 2 for grid in grids)
    # Two clients; those of H2Tune are tested without their core, too.
    assert len(lines) == 2 * (num_runs + 2)
    without = [x for x in lines if x["split"] == "without"]
    assert {x["row"] for x in without} == {"h2tune"}
    best = bench.chosen_rate(lines, "h2tune", rates)
    tested = [line for line in lines if line["split"] == "test"]
    assert {line["rate"] for line in tested if line["row"] == "h2tune"} == {best}
    up = {line["row"]: line["numbers_up"] for line in tested}
    assert up["local"] == 0 < up["h2tune"]

    # What is there is never run again.
    before = path.read_text()
    bench.main(command)
    assert path.read_text() == before
    settings = bench.plan.smoke(tmp_path)
    setting = settings["smoke"]
    # Tests with a rate that is not the best any more are kept in the file, and not reported.
    other = next(rate for rate in rates if rate != best)
    stale = [{**x, "rate": other} for x in tested if x["row"] == "h2tune"]
    bench.append(path, stale)
    kept = report.measured(setting, settings, tmp_path)
    assert [line for line in kept if line["row"] != "local_by_task"] == lines
    # Of one task, so at the rate of `local`: its own tests.
    taken = [{**x, "row": "local_by_task"} for x in tested if x["row"] == "local"]
    assert [line for line in kept if line["row"] == "local_by_task"] == taken
    rows = {name: setting.rows[name] for name in ("local", "h2tune")}
    assert bench.progress(setting, rows, tmp_path)[:2] == (num_runs, num_runs)
    # Where only tests with another rate are left, those with the best are to be done.
    whole = path.read_text()
    gone = [x for x in [*lines, *stale] if x not in tested and x not in without]
    path.unlink()
    bench.append(path, gone)
    far = bench.progress(setting, rows, tmp_path)
    assert far.total - far.finished == 4
    bench.main(command)
    assert bench.progress(setting, rows, tmp_path)[:2] == (num_runs, num_runs)
    path.write_text(whole)
    found = report.found_of(setting, kept)
    text = "\n".join(report.table(setting, found))
    assert [row.name for row in found] == ["local", "local_by_task", "h2tune"]
    assert "Not run yet: fedit." in text
    report.draw(setting, found, tmp_path / "smoke.svg")
    assert "h2tune" in (tmp_path / "smoke.svg").read_text()
