"""Stand-ins for vLLM, SGLang and llama-server: small servers in a thread of the test, which speak
the documented form of each and answer from the real decoder, one forward pass a token.

They are not those servers: they show that requests, replies and faults are handled, not what a real
engine computes.
"""

import functools
import http.server
import json
import pathlib
import threading

import jax
import numpy as np

from dcmdp_jax.models import decoder, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.tokens import tokenizer
from support.random_params import random_params

MODEL = ModelConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
TOKENIZER = tokenizer.CharacterTokenizer("<0x41>é日🙂 abcdefghijklmnopqrstuvwyz")  # 1 stops
POSITIONS = 64


@functools.cache
def make_params(version=0):
    """Weights far from a uniform distribution; those of another version are reversed."""
    params = random_params(MODEL, 0.16, norms=1.0)
    return params if version == 0 else jax.tree.map(lambda w: w[..., ::-1], params)


@functools.cache
def logits_of(model):
    """The compiled forward pass, (params, rows [R, S]) -> [R, S, V]."""
    return jax.jit(lambda params, rows: decoder.logits(params, rows, model))


class Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class Drawn:
    """A completion: its tokens, and their log-probs under two distributions."""

    def __init__(self):
        self.tokens = []
        self.raw = []  # of softmax(logits)
        self.tempered = []  # of softmax(logits / temperature)
        self.labels = []  # of the weights of each token
        self.stopped = False


class StandIn:
    """A server at `url`, of one of the kinds of this module; use it in a `with`.

    `faults` are functions of (handler, number of the request for a completion): one that returns
    True has answered in the place of the server.
    """

    def __init__(self, kind, model=MODEL, params=None, stop_ids=(1,)):
        self.kind = kind
        self.model = model
        self.started_with = params if params is not None else make_params()
        self.stop_ids = stop_ids  # that the server itself knows
        self.raw = False  # reports log-probs from before the temperature
        self.top_k = 0  # its own default, which no request changes
        self.faults = []
        self.after_token = lambda count, labels: None  # is called in each completion
        self.asked = []  # bodies of requests for completions, as they came
        self.paths = []  # of all requests
        self.loaded = []  # folders, as they were loaded
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.steps = threading.Condition()  # no token is drawn while a server is paused
        self._logits = logits_of(model)
        self.restart()

    def restart(self):
        """Has again what it was started with."""
        self.params = self.started_with
        self.label = "default"
        self.paused = False

    def __enter__(self):
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                stand_in.answer(self, "GET", None)

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                stand_in.answer(self, "POST", json.loads(body) if body else None)

            def log_message(self, *args):
                pass

        self._handler = Handler
        self.listen(0)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def listen(self, port):
        self.http = Http(("127.0.0.1", port), self._handler)
        self.http.stand_in = self
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def hang_up(self):
        self.http.shutdown()
        self.http.server_close()

    def __exit__(self, *error):
        self.hang_up()

    def answer(self, handler, method, body):
        path = handler.path.split("?")[0]
        with self._lock:
            self.paths.append(handler.path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if path == self.kind.path and not body:
                send(handler, {"error": "no prompt"}, 400)
            elif path == self.kind.path:
                with self._lock:
                    number = len(self.asked)
                    self.asked.append(body)
                if any([fault(handler, number) for fault in self.faults]):
                    return
                assert self.kind.keeps or not self.paused, "asked while paused"
                send(handler, self.kind.complete(self, body))
            else:
                status, reply = self.kind.control(self, method, path, body)
                send(handler, reply, status)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client has left, or the server has died
        finally:
            with self._lock:
                self._at_once -= 1

    def load(self, folder):
        """Reads weights, as a server does."""
        _, self.params = weights.load(folder)
        self.loaded.append(pathlib.Path(folder).name)

    def draw(self, prompt, max_tokens, temperature, seed, stop_ids, stop_strings=()):
        rng = np.random.default_rng(seed)
        row = np.zeros((1, POSITIONS), np.int32)
        row[0, : len(prompt)] = prompt
        out = Drawn()
        for place in range(len(prompt), len(prompt) + max_tokens):
            with self.steps:
                self.steps.wait_for(lambda: not self.paused)
                logits = np.asarray(self._logits(self.params, row))[0, place - 1].astype(np.float64)
                out.labels.append(self.label)
            raw = logits - np.logaddexp.reduce(logits)
            if self.top_k:
                logits[np.argsort(logits)[: -self.top_k]] = -np.inf
            tempered = logits / temperature - np.logaddexp.reduce(logits / temperature)
            token = min(int((np.cumsum(np.exp(tempered)) < rng.random()).sum()), len(logits) - 1)
            row[0, place] = token
            out.tokens.append(token)
            out.raw.append(float(raw[token]))
            out.tempered.append(float(raw[token] if self.raw else tempered[token]))
            text = TOKENIZER.decode(out.tokens) if stop_strings else ""
            out.stopped = token in stop_ids or any(stop in text for stop in stop_strings)
            if out.stopped:
                break
            self.after_token(len(out.tokens), out.labels)
        return out


def send(handler, reply, status=200):
    data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


NOT_FOUND = (404, {"detail": "Not Found"})


class Vllm:
    """The form of vLLM 0.32."""

    path = "/v1/completions"
    keeps = False  # requests under way while it is paused

    def complete(server, body):
        assert body["model"] == "policy" and body["return_token_ids"] and body["n"] == 1
        stop_ids = body["stop_token_ids"] if body["ignore_eos"] else server.stop_ids
        drawn = server.draw(
            body["prompt"],
            body["max_tokens"],
            body["temperature"],
            body["seed"],
            stop_ids,
            body["stop"],
        )
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": drawn.tempered, "tokens": [], "top_logprobs": None},
            "finish_reason": "stop" if drawn.stopped else "length",
            "token_ids": drawn.tokens,
            "prompt_token_ids": body["prompt"],
        }
        return {"object": "text_completion", "model": "policy", "choices": [choice]}

    def control(server, method, path, body):
        if (method, path) == ("GET", "/version"):
            return 200, {"version": "0.32.0"}
        if (method, path) == ("GET", "/v1/models"):
            return 200, {"object": "list", "data": [{"id": "policy"}]}
        if (method, path) == ("GET", "/weight_info"):
            return 200, {"weight_version": server.label}
        if path == "/pause":
            if f"/pause?mode={'keep' if server.kind.keeps else 'abort'}" != server.paths[-1]:
                return 400, {"error": f"{server.paths[-1]} is not what this kind is asked"}
            with server.steps:
                server.paused = True
            return 200, {"status": "paused"}
        if path == "/resume":
            with server.steps:
                server.paused = False
                server.steps.notify_all()
            return 200, {"status": "resumed"}
        if path == "/reset_prefix_cache":
            return 200, {
                "success": "/reset_prefix_cache?reset_running_requests=true" in server.paths
            }
        if path == "/collective_rpc":
            if body["method"] != "reload_weights" or not server.paused:
                return 400, {"error": f"{body['method']} of a server that samples"}
            try:
                server.load(body["kwargs"]["weights_path"])
            except ValueError as error:
                return 500, {"error": {"message": str(error)}}
            return 200, {"results": [None]}
        if path == "/update_weight_version":
            server.label = body["new_version"]
            return 200, {"success": True, "new_version": server.label}
        return NOT_FOUND


class VllmInFlight(Vllm):
    """The form of vLLM 0.32 with `--enable-scale-out`."""

    path = "/inference/v1/generate"
    keeps = True

    def complete(server, body):
        params = body["sampling_params"]
        assert body["model"] == "policy" and params["n"] == 1 and params["ignore_eos"]
        drawn = server.draw(
            body["token_ids"],
            params["max_tokens"],
            params["temperature"],
            params["seed"],
            params["stop_token_ids"],
            params["stop"],
        )
        starts = [
            place
            for place, label in enumerate(drawn.labels)
            if place == 0 or label != drawn.labels[place - 1]
        ]
        ends = [*starts[1:], len(drawn.tokens)]
        choice = {
            "index": 0,
            "finish_reason": "stop" if drawn.stopped else "length",
            "token_ids": drawn.tokens,
            "weight_versions": [
                {"version": drawn.labels[start], "start": start, "end": end}
                for start, end in zip(starts, ends)
            ],
            "logprobs": {
                "content": [
                    {"token_id": token, "logprob": logp, "rank": 1, "top_logprobs": []}
                    for token, logp in zip(drawn.tokens, drawn.tempered)
                ]
            },
        }
        prompt = body["token_ids"] if body["return_token_ids"] else None
        return {"model": "policy", "prompt_token_ids": prompt, "choices": [choice]}


class Sglang:
    """The form of SGLang."""

    path = "/generate"
    keeps = False

    def complete(server, body):
        sampling = body["sampling_params"]
        assert body["return_logprob"] and sampling["top_k"] == -1 and "ignore_eos" not in sampling
        label = server.label
        drawn = server.draw(
            body["input_ids"],
            sampling["max_new_tokens"],
            sampling["temperature"],
            sampling["sampling_seed"],
            {*sampling["stop_token_ids"], *server.stop_ids},
            sampling["stop"],
        )
        reason = {"type": "length", "length": sampling["max_new_tokens"]}
        if drawn.stopped:
            reason = {"type": "stop", "matched": drawn.tokens[-1]}
        return {
            "text": "",
            "output_ids": drawn.tokens[:-1] if drawn.stopped else drawn.tokens,
            "meta_info": {
                "finish_reason": reason,
                "prompt_tokens": len(body["input_ids"]),
                "completion_tokens": len(drawn.tokens),
                "weight_version": label,
                "output_token_logprobs": [
                    [logp, token, None] for logp, token in zip(drawn.tempered, drawn.tokens)
                ],
            },
        }

    def control(server, method, path, body):
        if (method, path) == ("GET", "/get_model_info"):
            return 200, {"model_path": "m", "is_generation": True, "weight_version": server.label}
        if path == "/pause_generation":
            server.paused = True
            return 200, {"status": "ok"}
        if path == "/continue_generation":
            server.paused = False
            return 200, {"status": "ok"}
        if path == "/update_weights_from_disk":
            assert server.paused and body["flush_cache"]
            try:
                server.load(body["model_path"])
            except ValueError as error:
                return 400, {"success": False, "message": str(error)}
            server.label = body["weight_version"]
            return 200, {"success": True, "message": "Succeeded to update model weights."}
        return NOT_FOUND


class LlamaCpp:
    """The form of llama-server."""

    path = "/completion"
    keeps = False

    def complete(server, body):
        assert body["return_tokens"] and body["n_probs"] == 1 and "stop" not in body
        drawn = server.draw(
            body["prompt"],
            body["n_predict"],
            body["temperature"],
            body["seed"],
            server.stop_ids,
        )
        if body["post_sampling_probs"]:
            reported = [{"id": t, "prob": np.exp(x)} for t, x in zip(drawn.tokens, drawn.tempered)]
        else:
            reported = [{"id": t, "logprob": x} for t, x in zip(drawn.tokens, drawn.raw)]
        return {
            "content": "",
            "tokens": drawn.tokens,
            "completion_probabilities": reported,
            "stop_type": "eos" if drawn.stopped else "limit",
            "tokens_evaluated": len(body["prompt"]),
            "truncated": False,
        }

    def control(server, method, path, body):
        if (method, path) == ("GET", "/props"):
            return 200, {"total_slots": 4, "model_path": "model.gguf"}
        return NOT_FOUND


# Faults


def once(*numbers):
    """Makes a fault happen at requests of these numbers alone."""

    def wrap(fault):
        return lambda handler, number: number in numbers and fault(handler, number)

    return wrap


def status(code):
    return lambda handler, number: send(handler, {"error": "injected"}, code) or True


def cut_reply(handler, number):
    """Half of a reply, and a closed connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"token_ids": [3, 4')
    handler.close_connection = True
    return True


def half_json(handler, number):
    """A complete reply whose JSON is cut."""
    send(handler, b'{"choices": [{"token_ids": [3, 4')
    return True


def closed(handler, number):
    """No reply."""
    handler.close_connection = True
    return True


def replaced(change):
    """Answers with a reply of the real form that `change` has changed."""

    def fault(handler, number):
        stand_in = handler.server.stand_in
        reply = stand_in.kind.complete(stand_in, stand_in.asked[number])
        change(reply)
        send(handler, reply)
        return True

    return fault


def held(gate):
    """Waits for the event `gate` before the server answers."""
    return lambda handler, number: not gate.wait(60)
