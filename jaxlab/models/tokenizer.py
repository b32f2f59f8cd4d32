"""Text to ids and back: bytes, `tokenizer.json` folders, GGUF files."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlab.core.errors import require
from jaxlab.core.untrusted import read_object, understood
from jaxlab.models.sources import find_model, locate


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer; those of transformers fit too."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: Iterable[Any]) -> str:
        """Text of ids."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, bos 256, eos 257. `encode` adds neither."""

    vocab_size = 258
    bos_token_id = 256
    eos_token_id: int | None = 257

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of bytes; bos and eos are left out, bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes files that `load_tokenizer` reads back as this class, and transformers as an equal tokenizer."""
        symbols = _byte_symbols()
        vocab = {symbols[byte]: byte for byte in range(256)}
        backend = _byte_level_bpe(vocab, [])
        backend.add_special_tokens([_special("<bos>"), _special("<eos>")])
        config = {"bos_token": "<bos>", "eos_token": "<eos>", "jaxlab_tokenizer": "bytes"}
        _write(Path(folder), backend, config)


class FastTokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and the chat template of its model.

    Args:
        backend: the `tokenizers.Tokenizer`.
        config: fields of `tokenizer_config.json` that are used: bos_token, eos_token, pad_token, unk_token,
            chat_template.
        source: the file it comes from, for messages.

    Raises:
        ValueError: one of them is no text.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any], source: str | os.PathLike[str] = "tokenizer"):
        self.backend = backend
        self._source = os.fspath(source)
        self.special_tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None:
                self.special_tokens[name] = _text(name, token)
        template = config.get("chat_template")
        self.chat_template: str | None = None if template is None else _text("chat_template", template)

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends a text, None if the model has none."""
        return self._id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id that starts a text, None if the model has none."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding, None if the model has none."""
        return self._id("pad_token")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the start token of models that want one; ValueError where its file is damaged."""
        with _damage_told(self._source):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[Any], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, without special tokens unless asked for; ValueError where its file is damaged."""
        with _damage_told(self._source):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, tokenize: bool = True
    ) -> list[int] | str:
        """A conversation as the model was trained on it.

        Args:
            messages: `{"role": "user" | "assistant" | "system", "content": text}` each.
            add_generation_prompt: end where the assistant begins to speak.
            tokenize: ids (the template's own special tokens, no others), else text.

        Raises:
            ValueError: the model has no chat template, or one that fails.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give the prompt as plain text")
        require("jinja2", "all")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            with understood("chat template"):
                text = environment.from_string(self.chat_template).render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    raise_exception=_raise,
                    **self.special_tokens,
                )
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        template = {"chat_template": self.chat_template} if self.chat_template is not None else {}
        _write(Path(folder), self.backend, self.special_tokens | template)


@contextlib.contextmanager
def _damage_told(what: str, also: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Makes a ValueError of what `tokenizers` raises over damaged files, and of other errors where asked to.

    That is bare Exceptions, and the panics of its Rust code, which are BaseExceptions.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException" and not isinstance(error, also):
            raise
        raise ValueError(f"{what}: {error!r}") from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {str(value)[:80]!r}")
    return value


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")


def _write(folder: Path, backend: Any, config: Mapping[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def chat_prompt(tokenizer: Any, text: str, system: str | None = None) -> str:
    """The chat template around one user message, ready for the assistant's answer.

    Args:
        tokenizer: of `load_tokenizer`.
        text: what the user says.
        system: a system message before it.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no chat template; give the prompt as plain text")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Opens the tokenizer of a model. Nothing is downloaded.

    Args:
        source: as in `load_pretrained`, or "bytes". Folders with `tokenizer.json` and GGUF files with a known
            byte-level vocabulary are opened directly (a fraction of a second); any other goes through transformers.

    Raises:
        FileNotFoundError: absent source or no tokenizer in it.
        ValueError: a damaged file.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = locate(source)
    if (path / "tokenizer.json").is_file():
        return _from_folder(path)
    path = find_model(path)
    if path.is_file():
        return _from_gguf(path)
    if not any((path / name).is_file() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{path} has no tokenizer.json, tokenizer.model or vocab.json")
    return _by_transformers(path)


def _by_transformers(folder: Path, **options: Any) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        with _damage_told(str(folder)):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
            tokenizer.decode(tokenizer.encode("a"))  # some damage shows in use only
    except ImportError as error:
        raise NotImplementedError(f"{folder}: transformers needs more to read its tokenizer: {error}") from error
    except Exception as error:  # whatever its many readers raise
        raise ValueError(f"{folder}: transformers does not read its tokenizer: {error}") from error
    return tokenizer


def _from_folder(folder: Path) -> Tokenizer:
    import tokenizers

    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_object(folder / name)
    if config.get("jaxlab_tokenizer") == "bytes":
        return ByteTokenizer()
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(config.get("chat_template"), list):
        entries = [entry for entry in config["chat_template"] if isinstance(entry, Mapping)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        config["chat_template"] = named.get("default")
    file = folder / "tokenizer.json"
    with _damage_told(f"{file} is not a tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    backend.no_padding()
    backend.no_truncation()
    return FastTokenizer(backend, config, file)


_DIGITS3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {
    # tokenizer.ggml.pre -> how text is split before merging; None is GPT-2's pattern. SmolLM splits digits too, which
    # its vocabulary does anyway (no merge joins two); transformers reads its GGUF files this way.
    "smollm": None,
    "gpt-2": None,
    "default": None,
    "llama-bpe": _DIGITS3,
    "llama3": _DIGITS3,
    "qwen2": _DIGITS3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_CONTROL, _USER_DEFINED = 3, 4


def _from_gguf(path: Path) -> Tokenizer:
    from jaxlab.models.gguf import GgufFile

    meta = GgufFile(path).metadata
    pre = meta.get("tokenizer.ggml.pre", "default")
    if meta.get("tokenizer.ggml.model") != "gpt2" or not isinstance(pre, str) or pre not in _SPLITS:
        return _by_transformers(path.parent, gguf_file=path.name)
    with _damage_told(f"{path}: the tokenizer in its metadata is damaged", Exception):
        return _of_metadata(path, meta, _SPLITS[pre])


def _of_metadata(path: Path, meta: Mapping[str, Any], split: str | None) -> FastTokenizer:
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    kinds = meta.get("tokenizer.ggml.token_type", [])
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    backend = _byte_level_bpe({token: index for index, token in enumerate(tokens)}, pairs, split)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config = {
        f"{short}_token": tokens[meta[f"tokenizer.ggml.{name}_token_id"]]
        for name, short in names.items()
        if f"tokenizer.ggml.{name}_token_id" in meta
    }
    backend.add_special_tokens([_special(token) for token, kind in zip(tokens, kinds) if kind == _CONTROL])
    backend.add_tokens([_plain(token) for token, kind in zip(tokens, kinds) if kind == _USER_DEFINED])
    if meta.get("tokenizer.ggml.add_bos_token") and "bos_token" in config:
        from tokenizers.processors import TemplateProcessing

        bos = config["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, meta["tokenizer.ggml.bos_token_id"])]
        )
    return FastTokenizer(backend, config | {"chat_template": meta.get("tokenizer.chat_template")}, path)


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], split: str | None = None) -> Any:
    """GPT-2's scheme: bytes as printable symbols, split by a pattern (None: GPT-2's), merged."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, symbols])
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_symbols() -> list[str]:
    """GPT-2's printable symbol of each byte: itself where Latin-1 prints it, else the next free one from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(free)) for byte in range(256)]


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, normalized=False, special=True)


def _plain(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, normalized=False, special=False)
