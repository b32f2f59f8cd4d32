"""Generation of whole batches, and of one text piece by piece."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxlab.inference.batch import Batch, LogitProcessor
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.text import RowText

# Stop strings are looked for on the host; a row runs on for less than this many tokens, which are then dropped.
_TEXT_SEGMENT = 16
_DEFAULTS = SamplingParams()


@struct.dataclass
class Generation:
    """What `generate` gives: R = len(prompts) * n rows, the n samples of a prompt adjacent.

    Attributes:
        tokens: `[R,N]` int32, N = max_tokens: what was generated, the stop token included, 0 after it.
        mask: `[R,N]` bool, True where a token was generated.
        logps: `[R,N]` float32, of the temperature-scaled, untruncated distribution (greedy: temperature 1).
        lengths: `[R]` int32, tokens generated.
        finish_reason: of each row, "stop" (a stop id or string) or "length".
        text: of each row, without its stop token or string; None without a tokenizer.
    """

    tokens: Int[Array, "r n"]
    mask: Bool[Array, "r n"]
    logps: Float[Array, "r n"]
    lengths: Int[Array, " r"]
    finish_reason: tuple[str, ...] = struct.field(pytree_node=False)
    text: tuple[str, ...] | None = struct.field(pytree_node=False)


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: SamplingParams = _DEFAULTS,
    *,
    n: int = 1,
    rng: Array | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
    logit_processor: LogitProcessor | None = None,
    prompt_length: int | None = None,
) -> Generation:
    """Continues prompts.

    Prompt and cache sizes and numbers of prompts are rounded up to powers of two, so that in a known bucket new
    weights, prompts and sampling values compile nothing. Row r draws with `fold_in(rng, r)`, and the token that comes
    to stand at position p with `fold_in` of that by p: a row never depends on its batch mates.

    Args:
        model: a `Decoder`.
        params: its parameters; without a mesh also in the form of `decode_params`.
        prompts: texts (with a tokenizer), or lists of ids, of any lengths.
        sampling: for all rows. Stop strings are looked for in a row's decoded text; its tokens then end with the one
            that completes the string.
        n: samples of each prompt, which is prefilled, held and read once (`SharedPrefixCache`; with sliding windows or
            a mesh, prefilled once).
        rng: PRNG key; None only at temperature 0.
        tokenizer: reads text prompts, gives `text`, and adds its `eos_token_id` to the stop ids.
        mesh: spreads rows over its "data" and "fsdp" axes, and parameters by `DEFAULT_RULES`.
        logit_processor: `(logits[R,V], tokens[R,N], lengths[R]) -> logits[R,V]`, before the temperature; it sees the
            tokens generated so far (0 after them) and how many they are. R and N are the bucketed sizes. It runs under
            jit, and another function object compiles anew: define it once.
        prompt_length: makes room for prompts of so many tokens, so that later calls with longer ones compile nothing;
            None: of the longest of these.

    Raises:
        ValueError: no prompts, an empty prompt, an id outside [0, V), prompt + max_tokens over
            max_position_embeddings, n < 1, a prompt over prompt_length, or temperature > 0 without rng.
        TypeError: text prompts or stop strings without a tokenizer.
    """
    batch = Batch(
        model,
        params,
        prompts,
        sampling,
        n=n,
        rng=rng,
        tokenizer=tokenizer,
        mesh=mesh,
        processor=logit_processor,
        prompt_length=prompt_length,
    )
    reader = None if tokenizer is None else RowText(tokenizer, sampling.stop, batch.stop_ids)
    by_text = reader is not None and bool(sampling.stop)
    for _ in batch.run(_TEXT_SEGMENT if by_text else max(batch.steps, 1), reader.completed if by_text else None):
        pass
    rows = [ids[:length] for ids, length in zip(batch.tokens, batch.lengths)]
    # device_put compiles nothing, where jnp.asarray makes a program for each new shape.
    mask = np.arange(batch.steps) < batch.lengths[:, None]
    tokens, mask, logps, lengths = jax.device_put((batch.tokens, mask, batch.logps, batch.lengths))
    return Generation(
        tokens=tokens,
        mask=mask,
        logps=logps,
        lengths=lengths,
        finish_reason=tuple("stop" if stopped else "length" for stopped in batch.stopped),
        text=None if reader is None else tuple(reader.final(ids) for ids in rows),
    )


def stream(
    model: Any,
    params: Any,
    prompt: str | Sequence[int],
    sampling: SamplingParams = _DEFAULTS,
    *,
    rng: Array | None = None,
    tokenizer: Any,
) -> Iterator[str]:
    """Continues one prompt and gives its text in pieces, as soon as they are certain.

    Joined, the pieces are the `text` that `generate` gives. None ends inside a character, and what may become a stop
    string waits until it does not.

    Args:
        model: as in `generate`.
        params: as in `generate`.
        prompt: text, or ids.
        sampling: as in `generate`.
        rng: as in `generate`.
        tokenizer: needed for the text.

    Raises:
        ValueError: as `generate`, at the call.
        TypeError: as `generate`, or the tokenizer is None.
    """
    if tokenizer is None:
        raise TypeError("tokenizer: expected one, got None; a stream is text")
    batch = Batch(model, params, [prompt], sampling, rng=rng, tokenizer=tokenizer)
    reader = RowText(tokenizer, sampling.stop, batch.stop_ids)

    def pieces() -> Iterator[str]:
        shown = ""
        for _ in batch.run(1, reader.completed):
            ids = batch.tokens[0, : batch.lengths[0]]
            last = batch.stopped[0] or len(ids) == batch.steps
            text = reader.final(ids) if last else reader.settled(ids)
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text

    return pieces()
