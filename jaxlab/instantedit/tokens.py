"""Prompts as CLIP's tokens: begin, text, end, padding."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxlab.instantedit.config import MAX_TOKENS
from jaxlab.models import load_tokenizer
from jaxlab.models.tokenizer import FastTokenizer

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """The tokenizer of a text encoder.

    Args:
      tokenizer: with begin and end tokens; without a padding token the end token pads, as in Stable Diffusion 1.5.
      length: of a padded prompt.

    Raises:
      ValueError: a tokenizer without begin or end token.
    """

    def __init__(self, tokenizer: FastTokenizer, *, length: int = MAX_TOKENS):
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None or end is None:
            raise ValueError(f"tokenizer: needs begin and end tokens, has {tokenizer.special_tokens}")
        self.tokenizer, self.length = tokenizer, length
        self.begin, self.end = begin, end
        self.pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, length: int = MAX_TOKENS) -> "PromptTokenizer":
        """Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`.

        Special tokens are those of `tokenizer_config.json` and `special_tokens_map.json`, or CLIP's.

        Raises:
          FileNotFoundError: the folder has neither.
          ValueError: a damaged file.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(folder)
            if not isinstance(tokenizer, FastTokenizer):
                raise ValueError(f"{folder} holds a tokenizer without begin and end tokens")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _byte_pairs(folder)
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
        for name, token in (("bos_token", _BEGIN), ("eos_token", _END)):
            if tokenizer.backend.token_to_id(token) is not None:
                tokenizer.special_tokens.setdefault(name, token)
        return cls(tokenizer, length=length)

    def words(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ids(self, prompt: str) -> list[int]:
        """Ids of a prompt with begin and end, without padding; what is too long is cut off, with a warning."""
        coded = self.tokenizer.backend.encode(prompt, add_special_tokens=False)
        room = self.length - 2
        if len(coded.ids) > room:
            cut = prompt[coded.offsets[room][0] :]
            warnings.warn(f"prompt: longer than {self.length} tokens; this is cut off: {cut!r}", stacklevel=2)
        return [self.begin, *coded.ids[:room], self.end]

    def padded(self, ids: list[int]) -> Int[np.ndarray, " length"]:
        """Ids of `ids`, padded, int32."""
        return np.array(ids + [self.pad] * (self.length - len(ids)), np.int32)


def strip_brackets(prompt: str) -> str:
    """A prompt of PIE-Bench without the brackets around what is edited."""
    return prompt.replace("[", "").replace("]", "")


def _byte_pairs(folder: Path) -> FastTokenizer:
    """CLIP's scheme: lower case, words end with a mark, bytes as printable symbols, merged."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

    try:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = (line.split() for line in lines if line and not line.startswith("#version"))
        merges = [(first, second) for first, second in pairs]
        config: dict[str, object] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config |= json.loads((folder / name).read_text(encoding="utf-8"))
        bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=_END)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{folder}: vocab.json and merges.txt are not a tokenizer: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (_BEGIN, _END) if token in vocab]
    backend.add_special_tokens(special)
    return FastTokenizer(backend, config)
