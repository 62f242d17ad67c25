"""A finished run of four steps, written by hand, and a strict reader of its page."""

import html.parser
import json

VOID = {"meta", "br", "hr", "img", "link", "input"}
CONFIG = {
    "name": "trial",
    "steps": 4,
    "seed": 0,
    "rollout": {"precision": {"weights": "int4"}, "samples": 8, "max_tokens": 32},
    "constraint": {"tolerance": 0.01, "dual_lr": 1.0, "multiplier_max": 0.2},
    "eval": {"prompts": 512},
}
DELTAS = (0.03, 0.01, 0.02, 0.004)  # two of four within the tolerance
ROWS = [
    {
        "step": i + 1,
        "reward": 0.2 * i,
        "delta_mean": d,
        "multiplier": 0.1,
        "multiplier_next": m,
        "k3": 1e-3,
        "entropy": 0.5 - 0.1 * i,
        "response_length": 30.0,
        "seconds": 2.0,
        "tokens": 500,
    }
    for i, (d, m) in enumerate(zip(DELTAS, (0.2, 0.2, 0.15, 0.125)))
]
ROWS[0] |= {"reward_eval_infer": 0.25, "reward_eval_train": 0.375}
ROWS[3] |= {"reward_eval_infer": 0.75, "reward_eval_train": 0.385}


class Page(html.parser.HTMLParser):
    """Refuses tags that do not nest; collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def make_run(folder, rows, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


GAPS = {
    "step": 4,
    "positions": [
        {"from": 0, "to": 8, "tokens": 10, "delta": 0.1},
        {"from": 8, "to": 16, "tokens": 5, "delta": 0.3},
    ],
    "worst": [
        {
            "position": 3,
            "token": 7,
            "text": "<b>",
            "before": "1 + ",
            "after": "",
            "delta": 0.4,
            "pi_train": 0.9,
            "pi_infer": 0.5,
            "reward": 1.0,
        }
    ],
}
SAMPLES = {
    "step": 4,
    "samples": [{"prompt": "1 + <b>", "completion": "2 & 3", "reward": 1.0}],
}
SOURCES = {
    "weights": "checkpoint 4",
    "noise_floor": 1e-7,
    "sources": [
        {
            "source": "weights",
            "setting": "int4",
            "alone": {"delta": 0.02, "std_error": 1e-3},
            "left_out": {"delta": 1e-6},
        }
    ],
}
