"""Data in the layouts of published data: a tokenizer, six evaluation sets, GSM8K.

Tests use the published data of ../shared/data as well, if that folder exists.
"""

import json
import pathlib

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
TOKENIZERS = ["own"] + ["qwen3"] * SHARED.is_dir()
ROOTS = ["own"] + ["published"] * SHARED.is_dir()

CORPUS = (
    "How many apples are in the box? There are twelve, and each of them is red.",
    "What is 2 + 2? It is 4, since 1 + 1 + 1 + 1 = 4.",
    "system user assistant tool: Be brief. Put the answer in a box, \\boxed{\\frac{1}{2}}.",
    "def f(x):\n    return x**2\n",
    "naïve café, 日本語, العربية",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

# messages between <|im_start|> and <|im_end|>; the reasoning of earlier replies is left out
TEMPLATE = """\
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content | default('', true) %}
        {%- if thought and loop.index0 > last.user %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A byte-level BPE trained on `CORPUS`, with Qwen's control tokens and `TEMPLATE`."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    small = tokenizers.Tokenizer(models.BPE())
    small.normalizer = normalizers.NFC()
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    small.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    small.add_special_tokens(list(SPECIAL))
    small.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in MARKS])
    folder.mkdir(parents=True, exist_ok=True)
    small.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _numbers(count: int, first: int) -> list[tuple[str, int]]:
    """Problems whose answers are whole numbers below 1000, as AIME asks for."""
    return [
        (
            f"A hall has ${first + n}$ rows of ${n + 3}$ seats, ${n}$ of them broken. "
            "How many are not?",
            (first + n) * (n + 3) - n,
        )
        for n in range(1, count + 1)
    ]


MATH = [
    ("Write one half plus one third as a fraction.", r"\frac{5}{6}"),
    ("What is the positive square root of twelve, simplified?", r"2\sqrt{3}"),
    ("Give the point that is two to the right of the origin and three below it.", "(2,-3)"),
    ("For which real numbers is the square at most four? Answer with an interval.", "[-2,2]"),
    ("Expand the product of x and one more than x.", "x^2+x"),
    ("What is the greatest common divisor of 84 and 126?", "42"),
    ("Write three quarters as a decimal.", "0.75"),
    ("How many degrees does each corner of a regular pentagon have?", r"108^\circ"),
    ("Write five sixths of the number pi.", r"\frac{5\pi}{6}"),
    ("How many subsets does a set of eleven elements have?", r"2,\!048"),
    ("List both square roots of nine.", "3,-3"),
    ("Solve for the negative number whose square is a quarter.", r"-\frac{1}{2}"),
]
PHYSICS = [
    ("A cart covers 36 metres in 8 seconds. Give its speed in metres per second.", "4.5"),
    ("How many joules does it take to lift 2 kg by 3 m where g is 9.8 m/s^2?", "58.8"),
    ("A lens magnifies 12 times. How large is the image of 0.4 mm, in millimetres?", "4.8"),
    ("Give the frequency, in hertz, of a period of 0.02 s.", "50"),
    ("How many coulombs are 3 A over 40 s?", "120"),
    ("Give the mean of the energies E and 3E.", "2E"),
    ("A star of 6000 K is twice as hot as another. How hot is that one, in kelvin?", "3000"),
    ("Give the distance light covers in 2 s, in metres, with c = 3e8 m/s.", r"6 \times 10^{8}"),
    ("What share of a sample is left after three half-lives?", r"\frac{1}{8}"),
    ("Write the area of a disc of radius R.", r"\pi R^2"),
    ("How many newtons stretch a spring of 250 N/m by 0.02 m?", "5"),
    ("Give the pressure, in pascal, of 90 N on 0.3 square metres.", "300"),
]
OLYMPIAD = [
    ("Find all integers whose square is 49.", ["7,-7"]),
    ("Find the least prime above 100.", ["101"]),
    ("Find the number of diagonals of a convex n-gon for n = 9.", ["27"]),
    ("Find the sum of the first 40 odd numbers.", ["1600"]),
    ("Find all primes p such that p + 2 and p + 4 are prime.", ["3"]),
    ("Find the largest value of x(10 - x).", ["25"]),
    ("Find the exact value of the golden ratio.", [r"\frac{1+\sqrt{5}}{2}"]),
    ("Find the number of orders of four books.", ["24"]),
    ("Find the remainder of 3^{20} modulo 10.", ["1"]),
    ("Find the radius of a circle of circumference 10.", [r"\frac{5}{\pi}"]),
    (
        "Find both legs, the shorter first, of the right triangle with hypotenuse 5 and area 6.",
        ["(3,4)"],
    ),
    ("Find the real root of x^3 = 8.", ["2"]),
]


def _rows() -> dict[str, list[dict]]:
    aime24 = [
        {
            "id": n,
            "problem": p,
            "solution": rf"So \boxed{{{a}}}.",
            "answer": str(a),
            "url": "",
            "question": p,
        }
        for n, (p, a) in enumerate(_numbers(12, 20))
    ]
    aime25 = [
        {"id": str(n), "question": p, "answer": float(a)}
        for n, (p, a) in enumerate(_numbers(12, 33))
    ]
    amc23 = [
        {"id": n, "problem": p, "answer": float(a), "url": "", "question": p}
        for n, (p, a) in enumerate(_numbers(12, 7))
    ]
    math500 = [
        {
            "problem": p,
            "solution": rf"We find $\boxed{{{a}}}$.",
            "answer": a,
            "subject": "Algebra",
            "level": 2,
            "unique_id": f"own/{n}.json",
        }
        for n, (p, a) in enumerate(MATH)
    ]
    minerva = [
        {
            "problem": p,
            "solution": rf"It is \boxed{{1}} at first, then \boxed{{{a}}}.",
            "type": "Own",
            "idx": n,
        }
        for n, (p, a) in enumerate(PHYSICS)
    ]
    olympiad = [
        {
            "id": n,
            "subfield": "Number Theory",
            "context": None,
            "question": p,
            "solution": ["By trying."],
            "final_answer": a,
            "is_multiple_answer": False,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        }
        for n, (p, a) in enumerate(OLYMPIAD)
    ]
    gsm8k = [
        {"question": p.replace("$", ""), "answer": f"{a} seats are whole.\n#### {a:,}"}
        for p, a in _numbers(24, 150)
    ]
    return {
        "math_eval/aime24": aime24,
        "math_eval/aime25": aime25,
        "math_eval/amc23": amc23,
        "math_eval/math500": math500,
        "math_eval/minerva_math": minerva,
        "math_eval/olympiadbench": olympiad,
        "gsm8k/train": gsm8k[:12],
        "gsm8k/test": gsm8k[12:],
    }


def answers() -> dict[str, list[str]]:
    """The gold answers of every file, in its order."""
    whole = {"aime24": 20, "aime25": 33, "amc23": 7}
    found = {
        f"math_eval/{name}": [str(a) for _, a in _numbers(12, first)]
        for name, first in whole.items()
    }
    listed = {
        "math500": MATH,
        "minerva_math": PHYSICS,
        "olympiadbench": [(p, ", ".join(a)) for p, a in OLYMPIAD],
    }
    found |= {f"math_eval/{name}": [a for _, a in pairs] for name, pairs in listed.items()}
    numbers = [f"{a:,}" for _, a in _numbers(24, 150)]
    return found | {"gsm8k/train": numbers[:12], "gsm8k/test": numbers[12:]}


def write_sets(folder: pathlib.Path) -> pathlib.Path:
    """Six evaluation sets and GSM8K's two files, a dozen rows each, named as the published ones."""
    for name, rows in _rows().items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
