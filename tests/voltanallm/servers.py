"""A small engine, tokenizers with and without a chat template, and clients of a live port."""

import contextlib
import json
import time

import httpx
import jax

from jaxlab.inference import Engine, EngineConfig
from jaxlab.models import ByteTokenizer, load_tokenizer
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.voltanallm import create_app, served
from tests.inference.multiprocess_cases import CONFIG

MODEL = "toy"
SIZES = EngineConfig(
    64, page_size=8, max_running=8, prefill_chunk=16, batch_buckets=(8,), kv_dtype="float32", prefix_cache=False
)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def toy_engine(**options):
    """An engine of random weights, larger than at the start of training, so that greedy texts do not repeat."""
    model = Decoder(CONFIG)
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(model, jax.random.key(0)))
    return Engine(model, params, SIZES, **options)


class Slowed:
    """An engine whose steps take at least so long, so that what happens meanwhile is sure to happen meanwhile."""

    def __init__(self, engine, seconds=0.01):
        self._engine, self._seconds = engine, seconds

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        time.sleep(self._seconds)
        return self._engine.step()


def chat_tokenizer(folder):
    """Bytes, with a chat template, as a folder of files would bring it."""
    ByteTokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
    del config["jaxlab_tokenizer"]
    file.write_text(json.dumps(config))
    return load_tokenizer(folder)


@contextlib.contextmanager
def live(engine, *, drain_s=5.0, **options):
    """A server on a port of its own: the application, and a client that asks it."""
    app = create_app(engine, model_name=MODEL, warm=False, **options)
    with served(app, drain_s=drain_s) as url, httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        yield app, client


def until(condition, seconds=10.0):
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def ask(client, prompt=(1, 2, 3), path="/v1/completions", **fields):
    """A completion of ids, short and greedy unless told otherwise."""
    return client.post(path, json={"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields})


def events(answer):
    """The data of a stream that has come whole."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
