"""Samples and verdicts of a model in this process: a `Qwen25VL` with its tokenizer.

    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.vlm_scaling import local, verify
    model, params = load_pretrained("folder")
    tokenizer = load_tokenizer("folder")
    sampler = local.ModelSampler(model, params, tokenizer, temperature=0.8)
    verifier = verify.Verifier(local.ModelReader(model, params, tokenizer))

What `endpoint` is for a server, this is without one. The samples of a question share its images and prompt; the
candidates of a question are judged in one pass.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlab.models import chat_prompt
from jaxlab.models.qwen2_5_vl import preprocess_image, smart_resize
from jaxlab.models.qwen2_5_vl.images import MAX_PIXELS, MIN_PIXELS
from jaxlab.vlm_scaling import images, inputs, sampling
from jaxlab.vlm_scaling.inputs import MODES, check_blind
from jaxlab.vlm_scaling.samples import Question, Sample
from jaxlab.vlm_scaling.verify import yes_probability

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
"""An image in a prompt."""

_KEPT_IMAGES = 64


class Prompts:
    """Texts and images as the requests of a model: its chat template or none, a placeholder for each image token."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        instruction: str = "",
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
    ):
        """Reads nothing yet.

        Args:
          model: a `Qwen25VL`, whose config names the tokens around images.
          tokenizer: of the model; without a chat template a prompt is its text and a line feed.
          system: message that comes first, where there is a chat template.
          instruction: put after each question, such as what to put the answer in.
          min_pixels: of `preprocess_image`.
          max_pixels: of `preprocess_image`.
        """
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._instruction, self._bounds = instruction, {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._templated = getattr(tokenizer, "chat_template", None) is not None
        self._known: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def question(self, question: Question, prompt: str | None = None, prefix: str = "") -> sampling.Request:
        """A question, or another prompt about its images; `prefix` is the beginning of the answer."""
        text = question.text if prompt is None else prompt
        text = f"{text}\n\n{self._instruction}" if self._instruction and prompt is None else text
        name = question.id if prompt is None and not prefix else f"{question.id}\n{text}\n{prefix}"
        return self.request(name, text, question.images, prefix)

    def verification(self, request: inputs.Request) -> sampling.Request:
        """What a verifier is asked.

        Raises:
          ValueError: a blind request with places for images.
        """
        made = self.request(f"{request.mode}\n{request.text}", request.text, request.images)
        if MODES[request.mode].image == "none":
            config = self._model.config
            marks = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
            check_blind(made.input_ids.tolist(), marks)
        return made

    def request(self, name: str, text: str, pictures: Sequence[Any] = (), prefix: str = "") -> sampling.Request:
        """Any text; images stand where its placeholders are, else before it.

        Raises:
          ValueError: placeholders that are not as many as the images.
        """
        text = text.replace(VISION, inputs.PLACEHOLDERS[0])
        places = text.count(inputs.PLACEHOLDERS[0])
        if places and places != len(pictures):
            raise ValueError(f"text: expected {len(pictures)} placeholders, one for each image, got {places}")
        text = text.replace(inputs.PLACEHOLDERS[0], VISION) if places else VISION * len(pictures) + text
        text = chat_prompt(self._tokenizer, text, self._system) if self._templated else f"{text}\n"
        pixels = [self.patches(picture) for picture in pictures]
        config, ids = self._model.config, []
        for place, piece in enumerate(f"{text}{prefix}".split(VISION)):
            if place:
                tokens = self.image_tokens(pictures[place - 1])
                ids += [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
            ids += self._encode(piece) if piece else []
        if not pixels:
            return sampling.Request(name, np.array(ids, np.int32))
        values = pixels[0][0] if len(pixels) == 1 else np.concatenate([value for value, _ in pixels])
        return sampling.Request(name, np.array(ids, np.int32), values, np.concatenate([grid for _, grid in pixels]))

    def _encode(self, text: str) -> list[int]:
        if self._templated:
            return self._tokenizer.encode(text, add_special_tokens=False)  # the template has its own
        return self._tokenizer.encode(text)

    def patches(self, picture: Any) -> tuple[np.ndarray, np.ndarray]:
        """`preprocess_image` of an image; equal images give one array, which is then encoded once in a batch."""
        name = images.label([picture])
        if name not in self._known:
            self._known[name] = preprocess_image(images.pixels(picture), **self._bounds)
            if len(self._known) > _KEPT_IMAGES:
                self._known.popitem(last=False)
        return self._known[name]

    def grid(self, picture: Any) -> tuple[int, int, int]:
        """Patches of an image along (time, height, width), without making them."""
        height, width = smart_resize(*images.pixels(picture).shape[:2], **self._bounds)
        side = self._model.config.vision.patch_size
        return 1, height // side, width // side

    def image_tokens(self, picture: Any) -> int:
        """Tokens that an image takes in a prompt, without the two around it."""
        return math.prod(self.grid(picture)) // self._model.config.vision.spatial_merge_size**2


class ModelSampler:
    """Draws samples: all that strategies ask of a sampler."""

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_tokens: int = 1024,
        allow_duplicates: bool = False,
        **prompts: Any,
    ):
        """Draws nothing yet.

        Args:
          model: a `Qwen25VL`.
          params: its parameters.
          tokenizer: reads prompts, writes samples, and gives the id that ends them.
          temperature: of the samples.
          top_p: nucleus of the samples.
          top_k: likeliest tokens that are drawn from; 0: all.
          max_tokens: of a sample.
          allow_duplicates: at temperature 0 several samples of a question may be asked for, with a warning.
          **prompts: of `Prompts`.

        Raises:
          ValueError: a temperature below 0, or `top_p` outside (0, 1].
        """
        if not temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a value in (0, 1], got {top_p}")
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._prompts = Prompts(model, tokenizer, **prompts)
        self._drawing: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self._max_tokens, self._allow_duplicates = max_tokens, allow_duplicates

    def sample(self, question: Question, indices: Sequence[int], *, seed: int) -> list[Sample]:
        """The samples of these indices, drawn together.

        Raises:
          ValueError: several at temperature 0, or a prompt too long for the model.
        """
        request = self._prompts.question(question)
        return self.draw([request], seed, n=len(indices), indices=indices)

    def greedy(self, question: Question) -> Sample:
        """The sample at temperature 0."""
        return self.draw([self._prompts.question(question)], 0, temperature=0.0)[0]

    def ask(self, question: Question, prompt: str, *, seed: int) -> Sample:
        """The answer to another prompt about the same images."""
        return self.draw([self._prompts.question(question, prompt)], seed)[0]

    def extend(
        self, question: Question, prefixes: Sequence[str], *, seed: int, max_tokens: int | None = None, stop: str = ""
    ) -> list[Sample]:
        """What follows begun answers: at most `max_tokens` each, up to and without `stop`."""
        requests = [self._prompts.question(question, prefix=prefix) for prefix in prefixes]
        return self.draw(requests, seed, max_tokens=max_tokens, stop=stop)

    def draw(
        self,
        requests: Sequence[sampling.Request],
        seed: int,
        *,
        max_tokens: int | None = None,
        stop: str = "",
        **how: Any,
    ) -> list[Sample]:
        """Samples of any requests; `how` goes to `sampling.sample`."""
        ends = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        stop_ids = self._tokenizer.encode(stop) if stop else []
        drawn = sampling.sample(
            self._model,
            self._params,
            requests,
            max_new_tokens=self._max_tokens if max_tokens is None else max_tokens,
            eos_ids=[*ends, *(stop_ids if len(stop_ids) == 1 else [])],
            key=jax.random.key(seed),
            allow_duplicates=self._allow_duplicates,
            **{**self._drawing, **how},
        )
        return [
            self._read(tokens[mask], logps[mask], ends, stop)
            for samples in drawn
            for tokens, mask, logps in zip(samples.tokens, samples.mask, samples.logps)
        ]

    def _read(self, tokens: np.ndarray, logps: np.ndarray, ends: Sequence[int], stop: str) -> Sample:
        count = len(tokens)
        if stop:
            # Text up to a token may hold what the text of that token alone does not.
            found = (n for n in range(1, count + 1) if stop in self._tokenizer.decode(tokens[:n].tolist()))
            count = next(found, count)
        shown = tokens[:count].tolist()
        text = self._tokenizer.decode(shown[:-1] if shown and shown[-1] in ends else shown)
        mean = float(np.mean(logps[:count])) if count else 0.0
        return Sample(text.split(stop)[0] if stop else text, count, mean)


class ModelReader:
    """Reads a verifier's requests: a `verify.TextReader` and `verify.ProbabilityReader`."""

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        *,
        temperature: float = 0.0,
        max_tokens: int = 256,
        yes: Sequence[str] = ("Yes", " Yes", "yes", " yes"),
        no: Sequence[str] = ("No", " No", "no", " no"),
        **prompts: Any,
    ):
        """Asks nothing yet.

        Args:
          model: a `Qwen25VL`.
          params: its parameters.
          tokenizer: of the model.
          temperature: of written verdicts; above 0 for `kind="k_vote"`.
          max_tokens: of a written verdict.
          yes: spellings; those that are one token count.
          no: spellings.
          **prompts: of `Prompts`.

        Raises:
          ValueError: a temperature below 0, or no spelling of yes or of no that is one token.
        """
        self._prompts = Prompts(model, tokenizer, **prompts)
        self._model, self._params = model, params
        self._sampler = ModelSampler(model, params, tokenizer, temperature=temperature, max_tokens=max_tokens)
        self._yes, self._no = (_single_tokens(tokenizer, words) for words in (yes, no))
        for name, words, ids in (("yes", yes, self._yes), ("no", no, self._no)):
            if not ids:
                raise ValueError(f"{name}: expected a spelling that is one token, got {list(words)}")

    def texts(self, requests: Sequence[inputs.Request], *, seed: int) -> list[str]:
        """What the model writes to each."""
        made = [self._prompts.verification(request) for request in requests]
        return [sample.text for sample in self._sampler.draw(made, seed)]

    def yes_probabilities(self, requests: Sequence[inputs.Request], *, seed: int) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for the first token, all requests in one pass."""
        made = [self._prompts.verification(request) for request in requests]
        logits = sampling.next_token_logits(self._model, self._params, made)
        return yes_probability(logits, self._yes, self._no).tolist()


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Those of the words that are a token, and come back from it: a closed vocabulary has one for all it lacks."""
    ids = [tokenizer.encode(word) for word in words]
    return sorted({own[0] for own, word in zip(ids, words) if len(own) == 1 and tokenizer.decode(own) == word})
