"""The driver alone: slots, queue, faults, and weights that change."""

import itertools
import queue
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.records import Sampling
from dcmdp_jax.serving.driver import Closed, Driver, Failed
from support.serving import (
    GREEDY,
    SLOTS,
    STEPS,
    Gate,
    Listener,
    fail,
    greedy,
    long_prompts,
    make_engine,
    make_prompts,
    make_weights,
    until,
)


@pytest.fixture
def start():
    """Makes drivers; whatever happens, they end with every slot free and an empty queue."""
    drivers = []

    def start(**options):
        drivers.append(
            Driver(make_engine(), make_weights(), **{"waiting": 50, "sampling": GREEDY} | options)
        )
        return drivers[-1]

    yield start
    for driver in drivers:
        assert driver.stop(timeout=60)
        assert driver.running == driver.waiting == 0


def submit(driver, *numbers):
    listeners = [Listener(number) for number in numbers]
    for listener in listeners:
        driver.submit(listener)
    return listeners


def answers(listeners):
    for listener in listeners:
        assert listener.ended.wait(60) and listener.error is None
    return [listener.received for listener in listeners]


def test_each_request_has_a_key_of_its_own_which_the_seed_repeats(start):
    def sample(**options):
        return answers(submit(start(**options), *[0] * 10))

    first = sample(seed=3, sampling=Sampling())
    assert first == sample(seed=3, sampling=Sampling()) and first != sample(
        seed=4, sampling=Sampling()
    )
    assert len({tuple(tokens) for tokens in first}) == 10
    assert sample(sampling=Sampling(temperature=5.0, top_k=1)) == [greedy()[0]] * 10


def test_stopping_ends_what_was_accepted_and_takes_no_more(start):
    driver = start()
    accepted = submit(driver, *range(len(make_prompts())))
    driver.close()
    with pytest.raises(Closed):
        submit(driver, 0)
    assert driver.stop(60) and not driver.live
    assert answers(accepted) == greedy()


def test_a_full_queue_counts_those_who_wait_for_an_answer(start, monkeypatch):
    gate = Gate(monkeypatch, make_engine())
    driver = start(waiting=2)
    accepted = submit(driver, *[0] * (SLOTS + 2))
    with pytest.raises(queue.Full):
        submit(driver, 0)
    accepted[-1].left = True
    accepted += submit(driver, 1)
    gate.open.set()
    del accepted[-2]
    assert answers(accepted) == [greedy()[0]] * (SLOTS + 1) + [greedy()[1]]


def test_a_slot_is_free_one_round_after_its_client_left(start, monkeypatch):
    gate = Gate(monkeypatch, make_engine())
    first, second = long_prompts()[:2]
    driver = start()
    leaver, stays = submit(driver, first, second)
    until(lambda: gate.calls == 1)
    queued = submit(driver, *[0] * SLOTS)
    for listener in [leaver, *queued[2:]]:
        listener.left = True
    gate.open.set()
    assert driver.stop(60)
    assert len(leaver.received) <= STEPS
    assert answers([stays, *queued[:2]]) == [greedy()[second], greedy()[0], greedy()[0]]
    assert not queued[2].received + queued[3].received
    assert not np.asarray(driver._state.active).any()


@pytest.mark.parametrize(
    "method", ["init_decode_state", "prefill", "bulk_insert", "generate", "read"]
)
def test_a_fault_fails_the_requests_in_the_slots(start, monkeypatch, method):
    engine = make_engine()
    calls = itertools.count()
    real = getattr(engine, method)

    def fails_once(*args, **kwargs):
        out = real(*args, **kwargs)  # which has taken the state it was given
        return fail() if next(calls) == 0 else out

    monkeypatch.setattr(engine, method, fails_once)
    driver = start()
    (hit,) = submit(driver, 0)
    assert (
        hit.ended.wait(60)
        and isinstance(hit.error, Failed)
        and "FloatingPointError" in str(hit.error)
    )
    assert answers(submit(driver, 0, 1, 2)) == greedy()[:3] and driver.live


def test_a_fault_spares_what_waits(start, monkeypatch):
    engine = make_engine()
    gate = Gate(monkeypatch, engine)
    read = engine.read
    faults = []
    driver = start()

    def once_full(result):
        if driver.running == SLOTS and not faults:
            faults.append(fail)
            fail()
        return read(result)

    monkeypatch.setattr(engine, "read", once_full)
    requests = submit(driver, *[1] * 3 * SLOTS)
    gate.open.set()
    assert driver.stop(60)
    failed = [request for request in requests if request.error]
    assert len(failed) == SLOTS and all(isinstance(request.error, Failed) for request in failed)
    assert (
        answers([request for request in requests if not request.error]) == [greedy()[1]] * 2 * SLOTS
    )


def test_weights_change_between_completions_only(start, monkeypatch):
    """Every answer is the greedy completion of the one version that it names."""
    gate = Gate(monkeypatch, make_engine())
    driver = start()
    numbers = sorted(range(len(make_prompts())), key=lambda i: len(greedy()[i]))
    numbers = [numbers[0], *reversed(numbers[1:])]  # some slots are free long before others
    first = submit(driver, *numbers)
    until(lambda: gate.calls)
    running = driver.running
    update = threading.Thread(target=driver.update_weights, args=(make_weights(7),))
    update.start()
    until(lambda: driver._next_weights is not None)
    with pytest.raises(ValueError, match="another exchange of weights is waiting"):
        driver.update_weights(make_weights(7))
    gate.open.set()
    update.join(60)
    second = submit(driver, *numbers)
    answers(first + second)
    for i, request in enumerate(first + second):
        (version,) = request.versions
        assert version == (0 if i < running else 7)
        assert request.received == greedy(version)[numbers[i % len(numbers)]]
    assert running and greedy(0) != greedy(7)


def test_damaged_weights_leave_nothing_behind(start):
    """NaN keys and values stay in a slot past the next sequence's end, where a mask alone does not
    stop them.
    """
    driver = start()
    good = make_weights(0)
    damaged = good._replace(params=jax.tree.map(lambda w: w * jnp.nan, good.params))
    with pytest.raises(ValueError, match="the new weights hold NaN or an infinite number"):
        driver.update_weights(damaged._replace(finite=False))
    driver.update_weights(damaged)
    for request in submit(driver, *range(8)):
        until(lambda request=request: request.error)
        assert isinstance(request.error, Failed) and not request.received, "no id is made up"
    driver.update_weights(good)
    assert answers(submit(driver, *range(8))) == greedy()[:8]


def test_weights_that_do_not_arrive_leave_the_old_ones_serving(start, monkeypatch):
    new = make_weights(7)
    driver = start()
    with pytest.raises(ValueError, match="not shaped as those that serve"):
        driver.update_weights(new._replace(params={"embed": new.params["embed"]}))
    gone = new._replace(params=jax.tree.map(lambda w: w + 0, new.params))
    jax.tree.leaves(gone.params)[0].delete()  # as donating it to a training step does
    with pytest.raises(RuntimeError, match="deleted"):
        driver.update_weights(gone)

    gate = Gate(monkeypatch, make_engine())
    held = submit(driver, 1)
    until(lambda: gate.calls)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.update_weights(new)
    finally:
        signal.signal(signal.SIGALRM, before)
    gate.open.set()
    held += submit(driver, 2)
    assert answers(held) == greedy()[1:3] and held[0].versions == held[1].versions == {0}

    driver.update_weights(new)
    assert answers(submit(driver, 1)) == [greedy(7)[1]]
    driver.close()
    with pytest.raises(Closed):
        driver.update_weights(make_weights(0))
