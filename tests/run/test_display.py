import io
import types
from pathlib import Path

import pytest
from rich.console import Console

from h2tune_jax.run import display as shown
from h2tune_jax.run.display import Display, Seen, follow, line, time_left
from h2tune_jax.run.events import Finished, Notice, RoundDone, Saved, Started

CONFIG = types.SimpleNamespace(
    name="demo",
    method=types.SimpleNamespace(name="h2tune"),
    groups=(types.SimpleNamespace(name="minilm"), types.SimpleNamespace(name="[smol]")),
)


def started(total=4, first=0):
    return Started(CONFIG, None, Path("runs/demo"), first, total)


def done(index, seconds=2.0, **changes):
    record = {
        "round": index,
        "cohorts": {
            "minilm": {"clients": [0, 2], "loss": [1.0, 2.0], "rejected": 1},
            "[smol]": {"clients": [1], "loss": [0.5], "rejected": 0},
        },
        "bytes_up": 1000,
        "bytes_down": 2500,
        "evaluation": {"trained": {"minilm": {"accuracy": [0.5, 0.75], "loss": [9, 9]}}},
        **changes,
    }
    return RoundDone(record, {"round": index, "seconds": seconds, "clients_per_second": 1.5})


def told(*events):
    seen = Seen()
    for event in events:
        seen = follow(seen, event)
    return seen


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def terminal(**options):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, **options)
    return console, console.file


def plain():
    console = Console(file=io.StringIO(), width=40)
    return console, console.file


def test_a_round_by_hand():
    seen = told(started(), done(0))
    minilm, smol = seen.groups
    assert minilm == ("minilm", 2, 1.5, "accuracy", 0.625, 1)
    assert smol == ("[smol]", 1, 0.5, "", None, 0)
    assert (seen.done, seen.bytes_up, seen.bytes_down) == (1, 1000, 2500)


def test_what_was_not_evaluated_keeps_its_last_value():
    seen = told(started(), done(0), done(1, evaluation={}))
    assert seen.groups[0].value == 0.625
    assert seen.groups[0].rejected == 2


def test_time_left_leaves_the_compiling_round_out():
    assert time_left(told(started())) is None
    assert time_left(told(started(), done(0, 60.0))) == 180
    assert time_left(told(started(), done(0, 60.0), done(1, 2.0), done(2, 4.0))) == 3
    assert time_left(told(started(first=3), done(3))) == 0


def test_one_line():
    assert line(told(started(), done(0))) == (
        "round 1/4 | minilm loss 1.5 accuracy 62.5 % rejected 1 | [smol] loss 0.5 | 1.5 clients/s"
        " | up 1 kB down 2.5 kB | 6 s left"
    )


def test_plain_lines_where_there_is_no_terminal():
    console, file = plain()
    clock = Clock()
    with Display(console, clock=clock) as display:
        display(started())
        for index in range(4):
            clock.now += 1
            display(done(index))
            display(Saved(index + 1, 0.1, 5))
        display(Notice("a checkpoint was skipped", "warning"))
        display(Finished("complete", 4, Path("runs/demo")))
    lines = file.getvalue().splitlines()
    assert lines[0] == "demo: h2tune, 4 rounds"
    assert [text.split(" |")[0] for text in lines[1:5]] == [f"round {i}/4" for i in (1, 2, 3, 4)]
    assert lines[5] == "warning: a checkpoint was skipped"
    assert lines[6] == "complete: 4 of 4 rounds, 8 s; results in runs/demo"
    assert len(lines) == 7
    assert "\x1b" not in file.getvalue()


def test_at_most_four_a_second_and_the_last_always():
    console, file = plain()
    clock = Clock()
    display = Display(console, clock=clock)
    display(started(total=100))
    for index in range(60):
        clock.now += 0.05
        display(done(index))
    display(Finished("interrupted", 60, None))
    rounds = [text for text in file.getvalue().splitlines() if text.startswith("round")]
    assert len(rounds) <= 3.0 / shown.INTERVAL + 2
    assert rounds[-1].startswith("round 60/100")
    assert file.getvalue().splitlines()[-1].startswith("interrupted: 60 of 100 rounds")


def test_live_table_on_a_terminal():
    console, file = terminal()
    with Display(console) as display:
        display(started())
        display(done(3))
        display(Finished("complete", 4, None))
    text = file.getvalue()
    assert "\x1b[?25l" in text  # the cursor is hidden, and
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again
    for part in (
        "round 4/4",
        "62.5 %",
        "[smol]",
        "1.5 clients/s",
        "minilm: results rejected as not finite: 1",
        "complete: 4 of 4",
    ):
        assert part in text


def test_no_color_gives_plain_lines(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = terminal()
    with Display(console) as display:
        display(started())
        display(done(0))
    assert "round 1/4 |" in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_a_run_that_raises_gives_the_terminal_back():
    console, file = terminal()

    def run():
        with Display(console) as display:
            display(started())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("make", [plain, terminal])
def test_a_broken_terminal_never_ends_the_run(make, capsys):
    console, file = make()
    display = Display(console)
    display(started())
    file.close()
    for index in range(3):
        display(done(index))
    display(Finished("complete", 4, None))
    assert capsys.readouterr().err.count("The display stopped, the run goes on") == 1


def test_events_it_cannot_read_never_end_the_run(capsys):
    display = Display(plain()[0])
    display(started())
    display(RoundDone({"round": None}, {}))
    assert "the run goes on" in capsys.readouterr().err


def test_evaluation_before_training():
    before = RoundDone({"round": -1, "evaluation": done(0).record["evaluation"]}, {"round": -1})
    seen = told(started(), before)
    assert seen.done == 0
    assert seen.groups[0].value == 0.625
    assert time_left(seen) is None


def test_many_groups_are_cut():
    groups = tuple(types.SimpleNamespace(name=f"group{i}") for i in range(40))
    config = types.SimpleNamespace(name="x", method=CONFIG.method, groups=groups)
    seen = told(Started(config, None, None, 0, 3))
    console, file = plain()
    console.print(shown.table(seen))
    assert f"{40 - shown.MOST_GROUPS} more groups" in file.getvalue()
    # Forty columns have room for the numbers.
    assert "clients" in file.getvalue()
    assert "evaluated" in file.getvalue()
    assert f"{40 - shown.MOST_GROUPS} more groups" in line(seen)
