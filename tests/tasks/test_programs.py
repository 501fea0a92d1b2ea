import math
import time

import pytest

from h2tune_jax.tasks.programs import ProgramError, evaluate_program

VALUES = {
    "n0 = 20.0\nn1 = 4.0\nt0 = n0 * n1\nanswer = t0 / 100.0\nprint(answer)": 0.8,
    "answer = 3 // 2 + 7 % 4": 4,
    "answer = -2 ** 2": -4,
    "2 ** -3": 0.125,
    "import math\nprint(math.sqrt(16) + math.floor(2.7))": 6.0,
    "from math import *\nprint(comb(5, 2) * factorial(3))": 60,
    "from math import pi as p\np": math.pi,
    "import math as m\nm.pi / 2": math.pi / 2,
    "x = 0\nfor i in range(1, 11):\n    x += i\nprint('sum', x)": 55,
    "a, b = 3, [4, 5]\nprint(a + b[-1])": 8,
    "x = y = 5\nprint(x * y)": 25,
    "if 2 > 1 >= 1 and not 3 == 4:\n    answer = 1\nelse:\n    answer = 2": 1,
    "print(1)\nprint(2, 'apples')": 2,
    "print(max(3, 4), min([1, 2]), sum([1, 2, 3]), len([0, 0]))": 2,
    "7 if 0 or 1 else 8": 7,
    "round(1234.567, 1)": 1234.6,
    "abs(-5) + int(2.9) + float(1)": 8.0,
    "x: float = 1.5\nx": 1.5,
    "sum(range(3000))": 4498500,
    "# a comment\nanswer = 1\n\n": 1,
}


@pytest.mark.parametrize("source", VALUES)
def test_value(source):
    value = evaluate_program(source)
    assert value == pytest.approx(VALUES[source], rel=1e-15)
    assert type(value) is type(VALUES[source])


REFUSED = {
    "import os": "Import is not allowed",
    "from os import system": "ImportFrom is not allowed",
    "from math import nextafter": "math.nextafter is not allowed",
    "import math\nmath.__loader__": "math.__loader__ is not allowed",
    "import math\nmath.sqrt.__self__": "Attribute is not allowed",
    "import math\nmath.sqrt": "math.sqrt is not allowed",
    "__import__('os').system('true')": "call",
    "print(open('/etc/passwd'))": "call of 'open",
    "eval('1')": "call of 'eval",
    "(1).__class__": "Attribute is not allowed",
    "().__class__.__bases__[0]": "Attribute is not allowed",
    "lambda: 1": "Lambda is not allowed",
    "def f():\n    return 1\nprint(f())": "FunctionDef is not allowed",
    "class A: pass": "ClassDef is not allowed",
    "while True: pass": "While is not allowed",
    "[x for x in range(3)]": "ListComp is not allowed",
    "f'{1}'": "JoinedStr is not allowed",
    "'a' * 10 ** 9": "Constant is not allowed",
    "x = [0] * 10 ** 9": "a number is needed",
    "1 << 10 ** 9": "LShift is not allowed",
    "print(1, file=2)": "not allowed",
    "global x": "Global is not allowed",
    "try:\n    1\nexcept Exception:\n    2": "Try is not allowed",
    "9 ** 9 ** 9": "a power beyond",
    "pow(9, 10 ** 8)": "a power beyond",
    "x = 3\n" + "x = x * x\n" * 40: "a whole number beyond",
    "0x" + "f" * 5000: "a whole number beyond",
    "range(10 ** 12)": "a range of more than",
    "for i in range(5000):\n    for j in range(5000):\n        x = 1": "more than 50000 steps",
    "for i in range(5000):\n    x = range(5000)": "more than 50000 steps",
    "x = range(5000)\nfor i in range(4000):\n    y = sum(x)": "more than 50000 steps",
    "round(1, -10 ** 9)": "a rounding",
    "from math import factorial\nfactorial(10 ** 6)": "factorial of something else",
    "from math import comb\ncomb(10 ** 6, 5 * 10 ** 5)": "comb of something else",
    "(-8) ** 0.5": "a value of type complex",
    "1e308 * 10": "not finite",
    "1e308 ** 2": "OverflowError",
    "1 / 0": "ZeroDivisionError",
    "[1, 2][5]": "IndexError",
    "y": "the name 'y' is not known",
    "print('nothing')": "prints no number",
    "x = 5": "prints no number",
    "1 is 1": "Is is not allowed",
    "x = (1": "not a program",
    "-" * 15_000 + "1": "not a program",
    "(" * 5000 + "1" + ")" * 5000: "not a program",
    "+".join(["1"] * 9000): "not a program|nested deeper",
    "+".join(["1"] * 100): "nested deeper",
    "a, b = 1": "different number of names",
    "1\n" * 10_001: "longer than",
    "for x in 5: pass": "a loop over",
}


@pytest.mark.parametrize("source", REFUSED, ids=lambda s: repr(s[:30]))
def test_refused_and_quickly(source):
    start = time.perf_counter()
    with pytest.raises(ProgramError, match=REFUSED[source]):
        evaluate_program(source)
    assert time.perf_counter() - start < 2
