"""A model of this process as sampler and reader: it is not trained, so that what is compared is how it is asked."""

import numpy as np
import pytest

from jaxlab.models import ByteTokenizer
from jaxlab.vlm_scaling import BestOfN, Greedy, Majority, ModelReader, ModelSampler, Study, inputs, verify
from jaxlab.vlm_scaling.inputs import build
from jaxlab.vlm_scaling.local import VISION, Prompts
from jaxlab.vlm_scaling.samples import (
    AskingSampler,
    ContinuingSampler,
    GreedySampler,
    Question,
    Sample,
    Sampler,
)
from jaxlab.vlm_scaling.sampling import next_token_logits
from tests.vlm_scaling import toys


@pytest.fixture(scope="module")
def trained():
    return toys.untrained()


@pytest.fixture(scope="module")
def sampler(trained):
    return trained.sampler(max_tokens=6)


@pytest.fixture(scope="module")
def question():
    return toys.questions(1)[0]


def test_it_is_all_that_strategies_ask_for(trained, sampler):
    for protocol in (Sampler, GreedySampler, ContinuingSampler, AskingSampler):
        assert isinstance(sampler, protocol)
    reader = trained.reader()
    assert isinstance(reader, verify.TextReader)
    assert isinstance(reader, verify.ProbabilityReader)


def test_a_sample_is_the_same_whoever_it_is_drawn_with(sampler, question):
    together = sampler.sample(question, range(4), seed=1)
    assert [sampler.sample(question, [index], seed=1)[0].text for index in (2, 0)] == [
        together[index].text for index in (2, 0)
    ]
    apart = sampler.sample(question, [1, 3], seed=1)
    assert [sample.text for sample in apart] == [together[1].text, together[3].text]
    assert apart[0].logprob == pytest.approx(together[1].logprob, abs=1e-5)
    assert len({sample.text for sample in together}) > 1
    assert sampler.sample(question, [0], seed=2)[0].text != together[0].text
    assert all(0 < sample.n_tokens <= 6 and sample.logprob < 0 for sample in together)


def test_what_is_asked_and_begun_changes_what_comes(sampler, question):
    plain = sampler.greedy(question)
    assert plain == sampler.greedy(question)
    assert sampler.ask(question, "Six cells", seed=0) != sampler.ask(question, "read the first", seed=0)
    begun = sampler.extend(question, ["read", "read circle"], seed=0, max_tokens=3)
    assert [sample.n_tokens for sample in begun] == [3, 3]
    assert begun[0].text != begun[1].text
    word = begun[0].text.split()[1]
    cut = sampler.extend(question, ["read"], seed=0, max_tokens=3, stop=word)[0]
    assert cut.text == begun[0].text.split(word)[0]
    assert cut.n_tokens == 2


def test_prompts_have_a_placeholder_for_each_image_token(trained, question):
    prompts, config = Prompts(trained.model, trained.tokenizer), trained.model.config
    ids = prompts.question(question).input_ids.tolist()
    first = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    assert ids[:8] == first
    assert prompts.image_tokens(question.images[0]) == 6
    moved = Question("", "Six <image> cells", "", question.images)
    assert prompts.question(moved).input_ids.tolist()[1:9] == first
    twice = Question("", f"{VISION}Six{VISION}", "", question.images * 2)
    request = prompts.question(twice)
    assert (request.input_ids == config.image_token_id).sum() == 12
    assert request.image_grid_thw.tolist() == [[1, 4, 6]] * 2
    with pytest.raises(ValueError, match="expected 1 placeholders, one for each image, got 2"):
        prompts.question(Question("", "<image><image>", "", question.images))


def test_a_chat_template_and_an_instruction(trained, question):
    class Chat(ByteTokenizer):
        chat_template = "there is one"

        def encode(self, text, *, add_special_tokens=True):
            return super().encode(text) + [self.eos_token_id] * add_special_tokens

        def apply_chat_template(self, messages, **_):
            return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"

    prompts = Prompts(trained.model, Chat(), system="Be brief.", instruction="Box it.")
    text = ByteTokenizer().decode(prompts.question(question).input_ids[8 + len("[system]Be brief.[user]") :])
    assert text == f"{question.text}\n\nBox it.[assistant]"
    assert ByteTokenizer().decode(prompts.question(question, "Again?").input_ids).endswith("Again?[assistant]")


def test_verdicts_are_read_in_one_pass_and_alone_alike(trained, question):
    samples = [Sample(f"<answer> {value} </answer>") for value in range(5)]
    reader = trained.reader()
    verifier = verify.Verifier(reader)
    for mode in ("image+solution", "blind+answer"):
        together = verifier.verify(question, samples, mode=mode)
        alone = [reader.yes_probabilities(build(question, [sample], mode=mode), seed=0)[0] for sample in samples]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert len({round(value, 6) for value in together}) > 1
    seen, blind = (verifier.verify(question, samples[:1], mode=mode)[0] for mode in ("image+answer", "blind+answer"))
    assert seen != pytest.approx(blind, abs=1e-6)
    texts = trained.reader(max_tokens=4).texts(build(question, samples[:2]), seed=0)
    assert all(isinstance(text, str) for text in texts)


def test_yes_probabilities_are_those_of_the_whole_model(trained, question):
    request = Prompts(trained.model, trained.tokenizer).verification(build(question, [Sample("read")])[0])
    logits, _ = trained.model.apply(
        {"params": trained.params},
        request.input_ids[None],
        pixel_values=request.pixel_values,
        image_grid_thw=request.image_grid_thw,
    )
    found = next_token_logits(trained.model, trained.params, [request])
    np.testing.assert_allclose(found[0], logits[0, -1], atol=2e-5)
    yes, no = (trained.tokenizer.encode(word)[0] for word in ("Yes", "No"))
    expected = 1 / (1 + np.exp(np.float64(logits[0, -1, no]) - np.float64(logits[0, -1, yes])))
    probability = trained.reader().yes_probabilities(build(question, [Sample("read")]), seed=0)[0]
    assert probability == pytest.approx(expected, abs=1e-6)


def test_a_study_over_it_asks_for_nothing_twice(trained, tmp_path):
    questions = toys.questions(2)
    strategies = [Greedy(), Majority(2), BestOfN(2)]

    def run(sampler, reader):
        verifier = verify.Verifier(reader)
        options = {"strategies": strategies, "n": 2, "verifier": verifier, "cache": tmp_path / "kept.jsonl"}
        return Study(questions, sampler, **options, n_resamples=100).run()

    class Never:
        def refuse(self, *args, **kwargs):
            raise AssertionError("it was drawn already")

        sample = greedy = yes_probabilities = refuse

    first = run(trained.sampler(max_tokens=6), trained.reader())
    assert run(Never(), Never()).accuracy == first.accuracy


@pytest.mark.parametrize(
    ("options", "said"), [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p")]
)
def test_bad_samplers(trained, options, said):
    with pytest.raises(ValueError, match=said):
        ModelSampler(*trained, **options)


def test_bad_questions(trained, sampler, question):
    with pytest.raises(ValueError, match="temperature 0"):
        trained.sampler(temperature=0.0).sample(question, [0, 1], seed=0)
    with pytest.warns(UserWarning, match="temperature 0"):
        pair = trained.sampler(temperature=0.0, allow_duplicates=True, max_tokens=2).sample(question, [0, 1], seed=0)
    assert pair[0] == pair[1]
    with pytest.raises(ValueError, match="yes: expected a spelling that is one token"):
        ModelReader(*trained, yes=("certainly",))
    marked = inputs.Request(VISION, question.images, "blind+solution")
    with pytest.raises(ValueError, match="no image tokens in a blind mode"):
        trained.reader().yes_probabilities([marked], seed=0)
