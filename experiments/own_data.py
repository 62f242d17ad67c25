"""What does a file of your own need? The quickstart with problems that are read from two files.

A line of own_data/train.jsonl has the prompt, the answer, and a column that this verifier alone
knows: the work that leads to the answer.

    {"prompt": "2*6-1*5-7+8=", "answer": "6", "work": "2*6=2;2-1=1;1*5=5;5-7=8;8+8=6;"}

The task stays for its alphabet and for the warm-up; a model folder brings a tokenizer, and needs
neither. own_data/test.jsonl holds problems out.

Command:  dcmdp train experiments/own_data.py --seed 1 --steps 40
Hardware: two CPU cores
Time:     2.2 minutes of CPU time (8 of the clock, beside about ten other programs)
Result:   mean reward on the 64 problems of test.jsonl 0.24 -> 0.75 by the engine's policy, 0.34 ->
          0.73 by the trainer's
"""

import dataclasses
import pathlib

from quickstart import CONFIG as QUICKSTART

FOLDER = pathlib.Path(__file__).parent / "own_data"


def with_its_work(example, text):
    """Returns 1.0 for the right answer after the right work, 0.5 for the answer alone."""
    work, _, answer = text.partition("#")
    right = answer == example.answer
    return 0.5 * right + 0.5 * (right and work == example.columns["work"])


CONFIG = dataclasses.replace(
    QUICKSTART,
    name="own_data",
    data=dataclasses.replace(
        QUICKSTART.data,
        path=str(FOLDER / "train.jsonl"),
        eval_path=str(FOLDER / "test.jsonl"),
        verifier=with_its_work,
    ),
    eval=dataclasses.replace(QUICKSTART.eval, prompts=64),
)
