"""A `records.Sampler` that draws completions from a server over HTTP.

What differs between servers is a `Server`: vllm.py, sglang.py and llama_cpp.py have one each.
"""

from __future__ import annotations

import bisect
import contextlib
import pathlib
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import sharding, stopping
from dcmdp_jax.config import Config
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import NotFinite, Prompts, Rollout, Sampling
from dcmdp_jax.rollout import log_prob_meaning, server_probe, temporary_weights
from dcmdp_jax.rollout.http_client import BadReply, Call, Client, ServerError
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tokens.tokenizer import Tokenizer

RESTARTS = 3  # of a server during one batch or update, after which the run ends
STOP_SECONDS = 10.0  # after a request to stop, in which what has no `should_stop` may still end
FOLDER = re.compile(r"\.?dcmdp-weights-[0-9a-f]{8}-\d+(\.\d+)?")  # of weights, written or half so


class Request(NamedTuple):
    """One completion that is wanted."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    seed: int  # 0 <= seed < 2**31


class Reply(NamedTuple):
    """One completion, as a server reports it."""

    tokens: list[int]
    logp: list[float | None]  # of each token; None where the server does not know it
    ended: bool  # by a stop token or string, not by the length limit
    labels: Sequence[str] = ()  # of the weights that sampled each token, where the reply says so


class Server(Protocol):
    """A kind of server."""

    client: Client
    path: str  # of requests for completions
    loads_weights: bool  # while it runs

    def body(self, request: Request) -> dict:
        """Returns the JSON that asks for a completion."""
        ...

    def read(self, reply: Any, request: Request) -> Reply:
        """Returns the completion in a reply. Raises BadReply if it is not of the right form."""
        ...

    def in_flight(self) -> Server:
        """Returns the server, asked so that `load` leaves requests under way, which go on with the
        new weights, and their replies have the labels of each token.

        Raises ServerError if it cannot do that.
        """
        ...

    def load(self, folder: pathlib.Path, label: str, should_stop: Callable[[], bool]) -> None:
        """Has the server sample with the weights in a Hugging Face folder, called `label`, from now
        on. The server answers no request meanwhile. A server that restarts meanwhile does not have
        that label.

        Raises ServerError if it does not, and `Interrupted` if `should_stop()`.
        """
        ...

    def label(self, should_stop: Callable[[], bool]) -> str | None:
        """Returns what the server calls its weights; None if they never change.

        Raises ServerError if they can change and the server has no name for them.
        """
        ...


def of_run(
    config: Config,
    model: ModelConfig,
    tokenizer: Tokenizer,
    server: Server,
    weights_folder: str = "",
) -> ServerSampler:
    """Returns the sampler of a run. Raises as `for_run` does."""
    return ServerSampler(
        model,
        tokenizer,
        for_run(config, server),
        weights_folder=weights_folder,
        temperature=config.rollout.temperature,
        learns=config.algorithm.learning_rate != 0,
    )


def for_run(config: Config, server: Server) -> Server:
    """Returns the server as the run asks it.

    Raises ValueError if the run wants something that a server over HTTP cannot do, or that this
    server cannot.
    """
    rollout = config.rollout
    name = f"{server.client.name} at {server.client.url}"
    check_support(Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p), name)
    if config.algorithm.replay_routing:
        raise ValueError(
            f"algorithm.replay_routing replays the experts that the sampler chose, and {name} is "
            "not asked for them; set --algorithm.replay_routing no"
        )
    if rollout.top_logprobs:
        raise ValueError(
            f"rollout.top_logprobs={rollout.top_logprobs} asks for the likeliest tokens at each "
            f"place, and {name} is asked for those that it samples alone; set "
            "--rollout.top_logprobs 0, and a surrogate that does not take them"
        )
    if rollout.one_engine:
        raise ValueError(
            "rollout.one_engine is one engine of all processes, and each process asks a server for "
            "its own completions; set --rollout.one_engine no"
        )
    if rollout.in_flight:
        if jax.process_count() > 1:
            raise ValueError(
                f"rollout.in_flight gives {name} new weights while it samples, from one process, "
                f"and {jax.process_count()} train; set --rollout.in_flight no"
            )
        server = server.in_flight()
    server.label(lambda: False)
    return server


def no_in_flight(server: Server) -> ServerError:
    """Returns the error of a server without `in_flight`."""
    return ServerError(
        f"rollout.in_flight changes weights in the middle of completions, and {server.client.name} "
        f"at {server.client.url} does not tell which tokens come from which; set "
        "--rollout.in_flight no, or sample from vLLM"
    )


def check_support(sampling: Sampling, name: str) -> None:
    """Raises ValueError if `sampling` cuts the support."""
    is_cut = {"top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1, "min_p": sampling.min_p > 0}
    for field, cut in is_cut.items():
        if cut:
            raise ValueError(
                f"rollout.{field}={getattr(sampling, field)} cuts the support that tokens are "
                f"drawn from, and {name} does not report how much of the probability is left, "
                "without which delta would count the cut as a gap; leave it out, or sample with "
                "the library's own engine"
            )


class _Coming(NamedTuple):
    """Weights in flight."""

    awaited: Any  # arrays
    params: Callable[[], Any]
    version: int


class ServerSampler:
    """A `records.Sampler`. Every process asks the server for its share of the completions; process
    0 gives it the weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        server: Server,
        *,
        weights_folder: str = "",
        temperature: float = 1.0,
        learns: bool = False,
    ):
        """Sends nothing; all processes must call.

        Args:
            weights_folder: where weights are written for the server, which must see it under the
                same path; one run may use it at a time. Empty: a temporary folder of this machine,
                which a later run removes if this process is killed.
            temperature: at which the meaning of the server's log-probs is checked.
            learns: whether the weights differ from one update to the next.
        """
        self._temperature = temperature
        self._learns = learns
        self._model = model
        self._tokenizer = tokenizer
        self._server = server
        self._temporary = None if weights_folder else temporary_weights.make_folder()
        self._folder = pathlib.Path(weights_folder or self._temporary.name).absolute()
        own = np.array([secrets.randbits(32)], np.uint32)
        self._run = f"dcmdp-weights-{processes.gather(own)[0]:08x}"  # one name for all processes
        self._updates = 0
        self.version: int | None = None  # of the weights that the server has
        self._versions: dict[str, int | None] = {}  # of the present batch, by the weights' labels
        self._coming: _Coming | None = None

    @property
    def _label(self) -> str:
        return f"{self._run}-{self._updates}"

    def update_weights(self, params: Any, version: int) -> None:
        """Writes a Hugging Face folder and has the server load it; see `records.Sampler`.

        Raises NotFinite if a parameter is not finite; ServerError if the server does not load them,
        or reports log-probs of something else; `Interrupted` where it takes over ten seconds after
        the process was asked to stop.
        """
        if not _all_finite(params):
            raise NotFinite(
                "the server is given weights that hold NaN or an infinite number; take a "
                "checkpoint or a model folder from before, and a smaller learning rate"
            )
        self.version = None
        self._updates += 1
        if self._server.loads_weights:
            on_host = _on_host(params)
            self._on_all(lambda: self._load(on_host) if jax.process_index() == 0 else None)
        elif self._updates > 1 and self._learns:
            raise ServerError(
                f"{self._name} takes no new weights while it runs, and a step has changed them; "
                "write them with dcmdp convert, convert them to GGUF, start the server with that "
                "file and go on, or sample from vLLM, SGLang or the library's own engine "
                "(only where algorithm.learning_rate is 0 can it stay as it is)"
            )
        if self._updates == 1:
            self._check_meaning(params)
        self.version = version

    @contextlib.contextmanager
    def in_flight(self, awaited: Any, params: Callable[[], Any], version: int) -> Iterator[None]:
        """Gives the server `params()` while it samples, once the arrays `awaited` are computed; see
        `records.Sampler`. What is not computed when the batch ends is not given.
        """
        self._coming = _Coming(awaited, params, version)
        try:
            yield
        finally:
            self._coming = None

    def _give_coming(self) -> None:
        """Gives the server the parameters in flight, if they are computed. Those that are not
        finite are left to `update_weights`, which refuses them.
        """
        coming = self._coming
        if coming is None or not all(x.is_ready() for x in jax.tree.leaves(coming.awaited)):
            return
        self._coming = None
        params = coming.params()
        if not _all_finite(params):
            return
        self._updates += 1
        self._load(_on_host(params))
        self._versions[self._label] = self.version = coming.version

    def _check_meaning(self, params: Any) -> None:
        """Raises ServerError unless the server's log-probs are those of the trainer's model at the
        run's temperature, up to number formats, or there is nothing to tell that from.
        """
        for count in server_probe.COUNTS:
            verdict = self._probe(params, count)
            if verdict.tokens >= log_prob_meaning.LEAST_TOKENS:
                break
        if verdict.name.endswith("other weights"):
            raise ServerError(
                f"{self._name}: {verdict.sentence}; {verdict.remedy}; a server that computes in 4 "
                "bits can look the same, and no option skips this check: serve at least 8 bits"
            )
        if verdict.name not in ("as stated", "cannot tell"):
            raise ServerError(f"{self._name}: {verdict.sentence}; {verdict.remedy}")
        processes.log0(f"log-probs of {self._name}: {verdict.sentence}")

    def _probe(self, params: Any, count: int) -> log_prob_meaning.Verdict:
        """Returns what the log-probs of `count` short completions mean; all processes must call."""
        prompts = server_probe.prompts(self._model.vocab_size, self._tokenizer.eos_ids, count)
        sampling = Sampling(self._temperature)
        requests = [
            Request(prompt, server_probe.TOKENS, sampling, self._tokenizer.eos_ids, (), number)
            for number, prompt in enumerate(prompts)
        ]
        replies = self._on_all(lambda: self._sampled(requests, _requested()))
        return server_probe.judge(
            params,
            self._model,
            prompts,
            [reply.tokens for reply in replies],
            [reply.logp for reply in replies],
            sampling,
            tokenizers.special_token_ids(self._tokenizer).get("bos_token_id"),
        )

    def _on_all(self, work: Callable[[], Any]) -> Any:
        """Returns `work()`; all processes must call, and raise if it raises on one."""
        result = None
        interrupted = False
        with processes.raise_on_all():
            try:
                result = work()
            except Interrupted:
                interrupted = True
        if processes.any_process(interrupted):
            raise Interrupted(f"stopped while {self._name} was given weights")
        return result

    def _load(self, params: Any) -> None:
        self._remove_folders()
        self._write(params)
        self._give(_requested())
        self._remove_folders(keep=self._label)

    def _give(self, should_stop: Callable[[], bool]) -> None:
        """Has the server load the written weights; again where it restarts meanwhile."""
        for _ in range(RESTARTS):
            self._server.load(self._folder / self._label, self._label, should_stop)
            found = self._server.label(should_stop)
            if found == self._label:
                return
            print(
                f"{self._name} has weights {found!r} after it was given {self._label!r}, as after "
                "a restart",
                file=sys.stderr,
            )
        raise ServerError(
            f"{self._name} was given weights {RESTARTS} times, and had others each time; look at "
            "its log for restarts, and let no other run use it"
        )

    def _write(self, params: Any) -> None:
        token_ids = tokenizers.special_token_ids(self._tokenizer)
        weights.save(self._folder / self._label, self._model, params, token_ids=token_ids)

    def _remove_folders(self, keep: str = "") -> None:
        """Removes the weights of before, those that a killed run left included."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if FOLDER.fullmatch(path.name) and path.name != keep:
                    shutil.rmtree(path)

    def sample(
        self,
        prompts: Prompts,
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_strings: tuple[str, ...],
        seed: int,
        offset: int,
        should_stop: Callable[[], bool],
    ) -> Rollout:
        """Asks the server for each completion; see `records.Sampler`.

        Where the server turns out to have other weights than those of the last update, as after a
        restart, it is given them again and the whole batch is sampled anew. Raises `Interrupted`
        ten seconds after the process was asked to stop, too, whatever `should_stop` returns.
        """
        if self.version is None:
            raise ValueError("the sampler has no weights; call update_weights first")
        check_support(sampling, self._name)
        requests = [
            Request(
                prompts.tokens[i // samples, : prompts.lengths[i // samples]].tolist(),
                max_tokens,
                sampling,
                tuple(self._tokenizer.eos_ids),
                stop_strings,
                completion_seed(seed, offset + i),
            )
            for i in range(len(prompts.lengths) * samples)
        ]
        requested = _requested()
        replies = self._sampled(requests, lambda: should_stop() or requested())
        return self._to_rollout(prompts, requests, replies)

    def _sampled(self, requests: list[Request], should_stop: Callable[[], bool]) -> list[Reply]:
        """Returns replies that come from the weights of the last update, or of one in flight."""
        for _ in range(RESTARTS):
            found = self._server.label(should_stop)
            if found in (None, self._label):
                self._versions = {self._label: self.version}
                replies = self._ask(requests, should_stop)
                last = self._server.label(should_stop)
                found = self._label if last is None else last
                unknown = {label for reply in replies for label in reply.labels}
                unknown -= self._versions.keys()
                if found == self._label and not unknown:
                    return replies
                found = next(iter(unknown), found)
            self._give_again(found, should_stop)
        raise ServerError(
            f"{self._name} had other weights than it was given {RESTARTS} times in one batch; look "
            "at its log for restarts, and let no other run use it"
        )

    @property
    def _name(self) -> str:
        return f"{self._server.client.name} at {self._server.client.url}"

    def _give_again(self, found: str, should_stop: Callable[[], bool]) -> None:
        if jax.process_count() > 1:
            raise ServerError(
                f"{self._name} has weights {found!r} instead of {self._label!r}: it was started "
                "again, or another run uses it; the same command goes on from the last checkpoint"
            )
        print(
            f"{self._name} has weights {found!r} instead of {self._label!r}, as after a restart; "
            "it is given them again, and the batch is sampled anew",
            file=sys.stderr,
        )
        self._give(should_stop)

    def _ask(self, requests: list[Request], should_stop: Callable[[], bool]) -> list[Reply]:
        calls = [Call("POST", self._server.path, self._server.body(each)) for each in requests]

        def read(reply: Any, number: int) -> Reply:
            request = requests[number]
            completion = self._server.read(reply, request)
            _check_reply(completion, request, self._model.vocab_size)
            return completion

        return self._server.client.send(calls, read, should_stop, meanwhile=self._give_coming)

    def _to_rollout(
        self, prompts: Prompts, requests: list[Request], replies: list[Reply]
    ) -> Rollout:
        shape = (len(requests), requests[0].max_tokens)
        tokens = np.zeros(shape, np.int32)
        logp = np.zeros(shape, np.float32)
        lengths = np.zeros(len(requests), np.int32)
        texts = np.zeros(len(requests), np.int32)
        stopped = np.zeros(len(requests), bool)
        versions = np.full(shape, self.version, np.int32)
        for i, (request, reply) in enumerate(zip(requests, replies, strict=True)):
            length, text_length = self._end(request, reply)
            tokens[i, :length] = reply.tokens[:length]
            logp[i, :length] = np.array(reply.logp[:length], np.float32)  # None becomes NaN
            versions[i, : len(reply.labels)] = [self._versions[label] for label in reply.labels]
            lengths[i] = length
            texts[i] = length if text_length is None else text_length
            stopped[i] = text_length is not None
        return Rollout(
            prompts, tokens, lengths, texts, logp, stopped, versions, requests[0].sampling
        )

    def _end(self, request: Request, reply: Reply) -> tuple[int, int | None]:
        """Returns the number of a completion's tokens, and of those of its text if it has stopped,
        else None.

        A completion ends where `records.Rollout` has it end, whatever the server went on to sample.
        """
        ids = reply.tokens
        text = next((i for i, token in enumerate(ids) if token in request.stop_ids), len(ids))
        end = stop_string_end(ids[:text], request.stop_strings, self._tokenizer.decode)
        if end is not None:
            return end, end
        if text < len(ids):
            return text + 1, text
        if reply.ended:
            raise ServerError(
                f"{self._name} ended a completion by a token or a text that is in none of the "
                f"tokens that it returned (the last is {ids[-1]}; the tokenizer's stop tokens are "
                f"{list(request.stop_ids)}), so that its log-prob is not known; serve the model "
                "with the run's tokenizer"
            )
        if len(ids) < request.max_tokens:
            raise ServerError(
                f"{self._name} ended a completion after {len(ids)} of {request.max_tokens} tokens "
                "at no stop token; serve the model with a context of data.max_prompt_tokens + "
                "rollout.max_tokens, or set a smaller rollout.max_tokens"
            )
        return len(ids), None


def _requested() -> Callable[[], bool]:
    """Returns a `should_stop` for what has none: true STOP_SECONDS after the request to stop.

    What would end anyway ends, so that a run stops at a step rather than before it.
    """
    since: float | None = None

    def should_stop() -> bool:
        nonlocal since
        if since is None and (stopping.requested() or processes.stop_requested()):
            since = time.monotonic()
        return since is not None and time.monotonic() - since >= STOP_SECONDS

    return should_stop


def completion_seed(seed: int, number: int) -> int:
    """Returns a seed of 31 bits, as all servers take it, for completion `number`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0] >> 1)


def stop_string_end(
    ids: Sequence[int], stop_strings: tuple[str, ...], decode: Callable[[Any], str]
) -> int | None:
    """Returns how many of `ids` have a text with a stop string in it; None if all together have
    none.
    """

    def holds(count: int) -> bool:
        text = decode(ids[:count])
        return any(stop_string in text for stop_string in stop_strings)

    if not stop_strings or not holds(len(ids)):
        return None
    return bisect.bisect_left(range(len(ids)), True, lo=1, key=holds)


def _check_reply(reply: Reply, request: Request, vocab_size: int) -> None:
    """Raises BadReply if the numbers of tokens and log-probs do not fit, or are no such numbers."""
    tokens = reply.tokens
    if not isinstance(tokens, list) or not isinstance(reply.logp, list):
        raise BadReply("has no list of token ids, or none of log-probs")
    if len(reply.logp) != len(tokens):
        raise BadReply(f"has {len(reply.logp)} log-probs of {len(tokens)} tokens")
    if not 1 <= len(tokens) <= request.max_tokens:
        raise BadReply(f"has {len(tokens)} tokens where 1 to {request.max_tokens} are wanted")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadReply(f"has {token!r:.40} for a token id of this vocabulary of {vocab_size}")
    for value in reply.logp:
        if value is not None and type(value) not in (int, float):
            raise BadReply(f"has {value!r:.40} for a log-prob")


def _all_finite(params: Any) -> bool:
    return bool(_finite(params).addressable_data(0))


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _on_host(params: Any) -> Any:
    """Returns parameters as NumPy arrays on process 0, and nothing of use on the others.

    One parameter at a time is complete on the devices of each process.
    """

    def leaf(x: jax.Array) -> Any:
        if not x.is_fully_addressable:
            whole = jax.jit(_identity, out_shardings=sharding.replicated(x.sharding.mesh))
            x = whole(x).addressable_data(0)
        return np.asarray(x) if jax.process_index() == 0 else None

    return jax.tree.map(leaf, params)


def _identity(x: jax.Array) -> jax.Array:
    return x
