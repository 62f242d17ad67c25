"""The table at the end of a run, against rows made by hand."""

from dcmdp_jax.report import final_table
from support.pages import CONFIG, make_run


def rows(steps):
    """Rewards rise by a tenth a step; an evaluation at the first step and the last."""
    made = [
        {"step": i + 1, "reward": i / 10, "delta_mean": 0.5, "tokens": 100, "seconds": 2.0}
        for i in range(steps)
    ]
    made[0]["reward_eval_infer"] = 0.25
    made[-1]["reward_eval_infer"] = 0.75
    return made


def lines(tmp_path, steps=20):
    made = final_table.text(make_run(tmp_path / "run", rows(steps), CONFIG)).splitlines()
    return {line.split("  ")[0]: line.split("  ", 1)[-1].split() for line in made}


def test_the_ends_are_means_over_a_tenth_of_the_steps(tmp_path):
    assert lines(tmp_path)["reward"] == ["0.050", "1.850"]


def test_the_held_out_reward_is_that_of_the_first_and_the_last_evaluation(tmp_path):
    shown = lines(tmp_path)
    assert shown["held-out engine"] == ["0.250", "0.750"]
    assert "start and end: means over 2 steps; held out: after steps 1 and 20" in shown


def test_delta_stands_beside_its_tolerance(tmp_path):
    tolerance = CONFIG["constraint"]["tolerance"]
    assert lines(tmp_path)["delta"] == ["0.5", "0.5", "tolerance", f"{tolerance:g}"]


def test_the_speed_is_tokens_over_the_seconds_of_the_steps(tmp_path):
    assert "20 steps in 40 s, 50 tokens/s" in lines(tmp_path)


def test_what_was_never_finite_is_left_out(tmp_path):
    made = [row | {"entropy": None} for row in rows(3)]
    assert "entropy" not in final_table.text(make_run(tmp_path / "run", made, CONFIG))
