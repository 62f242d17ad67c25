"""The driver alone: slots, queue, failures of the engine, and exchanges of weights."""

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

pytestmark = pytest.mark.full


@pytest.fixture
def start():
    """Starts drivers; at the end of a test all slots must be free and the queue empty."""
    drivers = []

    def start_driver(**options):
        options = {"waiting": 50, "sampling": GREEDY} | options
        drivers.append(Driver(make_engine(), make_weights(), **options))
        return drivers[-1]

    yield start_driver
    for driver in drivers:
        assert driver.stop(timeout=60)
        assert driver.running == driver.waiting == 0


def submit(driver, *numbers):
    """Submits requests for the prompts with these numbers and returns them."""
    listeners = [Listener(number) for number in numbers]
    for listener in listeners:
        driver.submit(listener)
    return listeners


def completions(listeners):
    """Waits for the completions and returns them."""
    for listener in listeners:
        assert listener.ended.wait(60) and listener.error is None
    return [listener.received for listener in listeners]


def sampled(driver):
    """Returns ten completions of prompt 0."""
    return completions(submit(driver, *[0] * 10))


def test_each_request_has_a_key_of_its_own(start):
    tokens = sampled(start(seed=3, sampling=Sampling()))
    assert len({tuple(completion) for completion in tokens}) == 10


def test_the_seed_repeats_the_completions(start):
    first = sampled(start(seed=3, sampling=Sampling()))
    assert first == sampled(start(seed=3, sampling=Sampling()))
    assert first != sampled(start(seed=4, sampling=Sampling()))


def test_the_sampling_options_are_used(start):
    assert sampled(start(sampling=Sampling(temperature=5.0, top_k=1))) == [greedy()[0]] * 10


def test_a_closed_driver_finishes_accepted_requests_and_refuses_others(start):
    driver = start()
    accepted = submit(driver, *range(len(make_prompts())))
    driver.close()
    with pytest.raises(Closed):
        submit(driver, 0)
    assert driver.stop(60) and not driver.live
    assert completions(accepted) == greedy()


def test_a_cancelled_request_makes_room_in_a_full_queue(start, monkeypatch):
    gate = Gate(monkeypatch, make_engine())
    driver = start(waiting=2)
    accepted = submit(driver, *[0] * (SLOTS + 2))
    with pytest.raises(queue.Full):
        submit(driver, 0)
    accepted[-1].left = True
    accepted += submit(driver, 1)
    gate.open.set()
    del accepted[-2]
    assert completions(accepted) == [greedy()[0]] * (SLOTS + 1) + [greedy()[1]]


def test_a_cancelled_requests_slot_is_free_after_one_round(start, monkeypatch):
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
    assert completions([stays, *queued[:2]]) == [greedy()[second], greedy()[0], greedy()[0]]
    assert not queued[2].received + queued[3].received
    assert not np.asarray(driver._state.active).any()


@pytest.mark.parametrize(
    "method", ["init_decode_state", "prefill", "bulk_insert", "generate", "read"]
)
def test_a_failing_engine_fails_the_requests_in_the_slots_alone(start, monkeypatch, method):
    engine = make_engine()
    calls = itertools.count()
    real = getattr(engine, method)

    def fails_once(*args, **kwargs):
        out = real(*args, **kwargs)  # the state is donated before the failure
        return fail() if next(calls) == 0 else out

    monkeypatch.setattr(engine, method, fails_once)
    driver = start()
    (failed,) = submit(driver, 0)
    assert failed.ended.wait(60)
    assert isinstance(failed.error, Failed) and "FloatingPointError" in str(failed.error)
    assert completions(submit(driver, 0, 1, 2)) == greedy()[:3] and driver.live


def test_a_failing_engine_does_not_fail_waiting_requests(start, monkeypatch):
    engine = make_engine()
    gate = Gate(monkeypatch, engine)
    read = engine.read
    failures = []
    driver = start()

    def fails_once_full(result):
        if driver.running == SLOTS and not failures:
            failures.append(result)
            fail()
        return read(result)

    monkeypatch.setattr(engine, "read", fails_once_full)
    requests = submit(driver, *[1] * 3 * SLOTS)
    gate.open.set()
    assert driver.stop(60)
    failed = [request for request in requests if request.error]
    assert len(failed) == SLOTS and all(isinstance(request.error, Failed) for request in failed)
    others = [request for request in requests if not request.error]
    assert completions(others) == [greedy()[1]] * 2 * SLOTS


def test_weights_change_between_completions_only(start, monkeypatch):
    """Every completion is the greedy one of the single version that it names."""
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
    gate.open.set()
    update.join(60)
    second = submit(driver, *numbers)
    completions(first + second)
    for i, request in enumerate(first + second):
        (version,) = request.versions
        assert version == (0 if i < running else 7)
        assert request.received == greedy(version)[numbers[i % len(numbers)]]
    assert running and greedy(0) != greedy(7)


def test_a_second_exchange_at_the_same_time_is_refused(start, monkeypatch):
    gate = Gate(monkeypatch, make_engine())
    driver = start()
    submit(driver, 0)
    until(lambda: gate.calls)
    update = threading.Thread(target=driver.update_weights, args=(make_weights(7),))
    update.start()
    until(lambda: driver._next_weights is not None)
    with pytest.raises(ValueError, match="another exchange of weights is waiting"):
        driver.update_weights(make_weights(7))
    gate.open.set()
    update.join(60)


def damaged_weights():
    good = make_weights(0)
    return good._replace(params=jax.tree.map(lambda w: w * jnp.nan, good.params))


def test_weights_that_are_not_finite_are_refused(start):
    with pytest.raises(ValueError, match="the new weights hold NaN or an infinite number"):
        start().update_weights(damaged_weights()._replace(finite=False))


def test_damaged_weights_leave_nothing_in_the_cache(start):
    """NaN keys and values stay in a slot past the next sequence's end, where a mask alone does not
    stop them.
    """
    driver = start()
    driver.update_weights(damaged_weights())  # marked as finite
    for request in submit(driver, *range(8)):
        until(lambda request=request: request.error)
        assert isinstance(request.error, Failed) and not request.received
    driver.update_weights(make_weights(0))
    assert completions(submit(driver, *range(8))) == greedy()[:8]


def test_weights_of_another_shape_are_refused(start):
    new = make_weights(7)
    with pytest.raises(ValueError, match="not shaped as those that serve"):
        start().update_weights(new._replace(params={"embed": new.params["embed"]}))


def test_weights_that_were_deleted_are_refused(start):
    """Donating them to a training step deletes them."""
    new = make_weights(7)
    deleted = new._replace(params=jax.tree.map(lambda w: w + 0, new.params))
    jax.tree.leaves(deleted.params)[0].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        start().update_weights(deleted)


def test_an_interrupted_exchange_leaves_the_old_weights(start, monkeypatch):
    driver = start()
    gate = Gate(monkeypatch, make_engine())
    running = submit(driver, 1)
    until(lambda: gate.calls)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.update_weights(make_weights(7))
    finally:
        signal.signal(signal.SIGALRM, previous)
    gate.open.set()
    requests = running + submit(driver, 2)
    assert completions(requests) == greedy()[1:3]
    assert all(request.versions == {0} for request in requests)


def test_new_weights_serve_after_an_exchange(start):
    driver = start()
    driver.update_weights(make_weights(7))
    assert completions(submit(driver, 1)) == [greedy(7)[1]]


def test_a_closed_driver_refuses_new_weights(start):
    driver = start()
    driver.close()
    with pytest.raises(Closed):
        driver.update_weights(make_weights(0))
