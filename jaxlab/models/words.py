"""A tokenizer whose tokens are the words of some texts: so few that a small decoder reads whole contexts."""

from collections.abc import Iterable, Sequence

from jaxlab.models.tokenizer import FastTokenizer

_WORD = r"</?\w+>|\w+(?:[-'’]\w+)*|[^\w\s]"
_UNSPACED = r"^ (?=[.,:;!?)\]]$)"  # these follow a word without a space


def word_tokenizer(texts: Iterable[str], *, special: Sequence[str] = ()) -> FastTokenizer:
    """A tokenizer of all words, tags and signs in some texts, others becoming `<unk>`; `<eos>` ends a text.

    White space separates words and is not kept: text comes back with single spaces, and none before a closing sign, so
    that a plan comes back as `format_plan` wrote it, up to white space between its blocks. `jaxlab.models` saves and
    opens it like any other.

    Args:
      texts: what is to be read and written.
      special: further tokens, each one token whatever signs it holds, and left out when ids become text.

    Raises:
      ValueError: there is no word in them.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    split = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    found = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    if not found:
        raise ValueError("texts: expected at least one word, got none")
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *special, *sorted(found)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Replace(tokenizers.Regex(_UNSPACED), "")]
    )
    added = ("<eos>", "<unk>", *special)
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in added])
    return FastTokenizer(backend, {"eos_token": "<eos>", "unk_token": "<unk>"})
