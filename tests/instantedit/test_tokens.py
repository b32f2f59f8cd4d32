import json
import re

import numpy as np
import pytest

from jaxlab.instantedit.tokens import PromptTokenizer, strip_brackets

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vocab.json and merges.txt in CLIP's order: symbols, symbols at the end of a word, merges, special tokens."""
    path = tmp_path_factory.mktemp("pairs")
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, BEGIN, END])}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PromptTokenizer.from_folder(folder)


@pytest.mark.latest
def test_ids_are_those_of_transformers(folder, tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    for prompt in ("a cat", "A  Cat's\n dog", "", "dogcat cat", "it's"):
        ids = tokenizer.ids(prompt)
        assert ids == theirs(prompt).input_ids
        padded = tokenizer.padded(ids)
        assert padded.dtype == np.int32
        assert padded.tolist() == theirs(prompt, padding="max_length", max_length=77).input_ids
    assert tokenizer.words("a cat") == tokenizer.ids("a cat")[1:-1]
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    again = PromptTokenizer.from_folder(tmp_path)
    assert again.ids("a cat's dog") == tokenizer.ids("a cat's dog")


def test_padding_is_the_folders_own(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "a</w>"}))
    tokenizer = PromptTokenizer.from_folder(tmp_path, length=6)
    ids = tokenizer.ids("cat dog")
    assert tokenizer.padded(ids).tolist() == [*ids, *[tokenizer.words("a")[0]] * 2]


def test_what_is_too_long_is_cut_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match=re.escape("77 tokens; this is cut off: 'Dog cat'")):
        ids = tokenizer.ids("cat " * 75 + "Dog cat")
    assert ids == tokenizer.ids("cat " * 75)
    assert len(ids) == 77


def test_brackets():
    assert strip_brackets("a [red] cat [with [hat]]") == "a red cat with hat"


def test_bad_folders(unchecked, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json"):
        PromptTokenizer.from_folder(tmp_path)
    for name, text in (("vocab.json", "{"), ("merges.txt", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="not a tokenizer"):
        PromptTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match=r"not a tokenizer|begin and end"):
        PromptTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        PromptTokenizer.from_folder(tmp_path)
