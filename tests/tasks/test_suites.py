"""Small files of the same form as the originals; every problem in them is made up here."""

import json
import math

import pytest
from words import Words

from h2tune_jax.tasks import encode_answers, encode_choices, exact_match
from h2tune_jax.tasks.suites import cut_blocks, prepare_glue, prepare_math
from h2tune_jax.types import FederationError

RFT, AQUA, POT = "data/CoT/gsm_rft.json", "data/CoT/aqua_rat.json", "data/PoT/mathqa.json"
PROBLEMS = [
    (RFT, "Ann has 2 pens and buys 3. How many has she?", "She has 2+3=5 pens.\nThe answer is 5"),
    (RFT, "What do 3 hats at $400 cost?", "3 * 400 = 1200\nThe answer is $1,200"),
    (RFT, "What is left?", "Nothing is left of the 7."),
    (
        AQUA,
        "A box holds 4 rows of 6 eggs. How many eggs?\nAnswer Choices: (A) 10 (B) 24 eggs (C) 46",
        "Let's think about the multi-choice question.\n4 * 6 = 24\nThe answer is B.",
    ),
    (AQUA, "Odd?\nAnswer Choices: (A) 1 (B) 2", "The answer is D."),
    (AQUA, "Unsaid?\nAnswer Choices: (A) 1 (B) 2", "A, I think"),
    (
        POT,
        "How far in 2 hours at 30 mph? Let's write a Python program.",
        "v = 30.0\nt = 2.0\nanswer = v * t\nprint(answer)",
    ),
    (POT, "How many ways? Let's program.", "import scipy.special\nprint(scipy.special.comb(5, 2))"),
    (POT, "Ways? Program it.", "import math\nprint(math.comb(5, 2) / 4)"),
    ("data/CoT/other.json", "Unrelated?", "The answer is 1"),
]


@pytest.fixture
def math_file(tmp_path):
    items = [{"source": s, "output": o, "instruction": i} for s, i, o in PROBLEMS]
    path = tmp_path / "MathInstruct.json"
    path.write_text(json.dumps(items, indent=4))
    return path


def test_fill_in_the_blank(math_file):
    rows, left_out = prepare_math(math_file, "blank")
    assert [row["target"] for row in rows] == ["5", "1200"]
    assert rows[0] == {
        "task": "blank",
        "prompt": PROBLEMS[0][1],
        "answer": PROBLEMS[0][2],
        "form": "number",
        "target": "5",
    }
    assert left_out == {"no answer can be extracted": 1}
    generated = ["2 + 3 = 5. The answer is 5.00", "The answer is 12,00"]
    assert exact_match("number", generated, [row["target"] for row in rows]) == 0.5


def test_multiple_choice(math_file):
    rows, left_out = prepare_math(math_file, "choice")
    assert len(rows) == 1
    assert rows[0]["target"] == "B"
    assert rows[0]["choices"] == ["10", "24 eggs", "46"]
    assert rows[0]["label"] == 1
    assert left_out == {
        "the answer is none of the choices": 1,
        "no answer can be extracted": 1,
    }
    encoded = encode_choices(rows, Words(), max_length=32)
    assert encoded.examples["input_ids"].shape == (1, 3, 32)
    assert encoded.examples["answer_mask"].sum(axis=-1).tolist() == [[1, 2, 1]]


def test_programs_are_evaluated_and_never_run(math_file, monkeypatch):
    def refuse(*_):
        raise AssertionError("a program was executed")

    monkeypatch.setattr("builtins.exec", refuse)
    monkeypatch.setattr("builtins.eval", refuse)
    rows, left_out = prepare_math(math_file, "program")
    assert [row["target"] for row in rows] == ["60", "5/2"]
    assert left_out == {"no answer can be extracted": 1}
    generated = ["print(30 * 2)", "print(3)"]
    assert exact_match("program", generated, [row["target"] for row in rows]) == 0.5


def test_bad_math_files_are_named(math_file, tmp_path):
    with pytest.raises(FederationError, match=r"'blanks'.*did you mean 'blank'"):
        prepare_math(math_file, "blanks")
    path = tmp_path / "a.json"
    path.write_text('[{"source": "x", "instruction": "y"}]')
    with pytest.raises(FederationError, match=r"a\.json, row 0: no text in the field 'output'"):
        prepare_math(path, "blank")
    path.write_text('[{"source": "x", "instruction": "y", "output": "z"}]')
    with pytest.raises(FederationError, match="no usable row has the source"):
        prepare_math(path, "program")


GLUE = {
    "sst2": 'sentence\tlabel\na warm , funny film \t1\nit "drags" on\t0\n',
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "0\t1\t2\tHow do I bake bread?\tHow is bread baked?\t1\n"
        "1\t3\t4\tWho won?\n"
        '2\t5\t6\tWhat is "jam"?\tWhere is Oslo?\t0\n'
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tThe cup is in the box since it is small.\tThe cup is small.\t1\n"
        "1\tThe cup is in the box since it is big.\tThe cup is big.\t0\n"
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n"
        "0\tWhere is Oslo?\tOslo lies in Norway.\tentailment\n"
        "1\tWhere is Rome?\tIt rained.\tnot_entailment\n"
    ),
}


@pytest.mark.parametrize(
    ("task", "targets", "piece"),
    [
        ("sst2", ["positive", "negative"], 'Review: it "drags" on\nAnswer:'),
        ("qqp", ["yes", "no"], 'Question 1: What is "jam"?\nQuestion 2: Where is Oslo?\nAnswer:'),
        ("wnli", ["yes", "no"], "Sentence 2: The cup is big.\nAnswer:"),
        ("qnli", ["yes", "no"], "Sentence: It rained.\nAnswer:"),
    ],
)
def test_glue_as_generation(tmp_path, task, targets, piece):
    path = tmp_path / "train.tsv"
    path.write_text(GLUE[task])
    rows, left_out = prepare_glue(path, task)
    assert [row["target"] for row in rows] == targets
    assert rows[1]["prompt"].endswith(piece)
    assert left_out == ({"a wrong number of columns": 1} if task == "qqp" else {})
    # What is learned is what is scored.
    assert exact_match("label", [row["answer"] for row in rows], targets) == 1.0
    encoded = encode_answers(rows, Words(), max_length=64)
    assert encoded.num_truncated == 0
    assert encoded.examples["answer_mask"].sum(axis=-1).tolist() == [2, 2]


def test_bad_glue_files_are_named(tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text("index\tsentence\n0\tno label here\n")
    with pytest.raises(FederationError, match=r"test\.tsv, row 0: no field 'label': has this file"):
        prepare_glue(path, "sst2")
    path.write_text("sentence\tlabel\nfine\t1\nodd\t2\n")
    with pytest.raises(
        FederationError, match=r"row 1: field 'label' has the value '2'.*allowed: 0"
    ):
        prepare_glue(path, "sst2")
    path.write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(FederationError, match="'sentence'; allowed: text, label"):
        prepare_glue(path, "sst2")
    with pytest.raises(FederationError, match=r"expected a \.tsv file"):
        prepare_glue(tmp_path / "gone.tsv", "sst2")
    with pytest.raises(FederationError, match=r"'sst'.*did you mean 'sst2'"):
        prepare_glue(path, "sst")


def test_blocks_follow_the_files_order():
    rows = [{"n": i} for i in range(14)]
    one, two = cut_blocks(rows, train=5, test=2, num_blocks=2)
    assert [row["n"] for row in one["train"]] == [0, 1, 2, 3, 4]
    assert [row["n"] for row in one["test"]] == [5, 6]
    assert [row["n"] for row in two["train"]] == [7, 8, 9, 10, 11]
    assert [row["n"] for row in two["test"]] == [12, 13]
    with pytest.raises(FederationError, match=r"3 blocks of 5 \+ 2 rows .* there are 14"):
        cut_blocks(rows, train=5, test=2, num_blocks=3)
    assert math.isclose(len(cut_blocks(rows, train=13, test=1)[0]["train"]), 13)
