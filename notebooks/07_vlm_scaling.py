# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # VLM scaling
#
# Draw many answers and vote, or let the model check its own? For language models both help. For vision-language models
# the study in [arXiv:2506.17417](https://arxiv.org/abs/2506.17417) found that votes win, and that a model hardly looks
# at the image when it checks. Here the whole protocol runs on a small model in a minute.

# %%
# %matplotlib inline
import textwrap
from collections import Counter

import numpy as np

from jaxlab.core.figures import figure
from jaxlab.vlm_scaling import (
    BestOfN,
    Greedy,
    Majority,
    Oracle,
    RandomOf,
    Study,
    WeightedVote,
    aha,
    choose,
    extract,
    grade,
    pictures,
    simulation,
    verify,
    visual_math,
)
from jaxlab.vlm_scaling.small_model import PACKAGED, Trained

# %% [markdown]
# ## The questions
#
# Three kinds, rendered with noise: digits (real handwriting) to add and subtract, bars to compare, shapes to count. The
# model is a Qwen2.5-VL of 0.6 million parameters, trained on other images of the same kinds.

# %%
families = {family: visual_math.questions(family, 30, split="test", noise=0.3) for family in visual_math.FAMILIES}
questions = [question for each in zip(*families.values()) for question in each]
drawn, axes = figure(9.0, 2.3)
for place, question in enumerate(questions[:3]):
    axes.imshow(question.images[0], extent=(100 * place, 100 * place + 84, 0, 56))
    axes.text(100 * place, -8, textwrap.fill(question.text, 32), fontsize=7.5, va="top")
axes.set_xlim(0, 284)
axes.set_ylim(-40, 58)
axes.set_axis_off()
drawn

# %% [markdown]
# What it writes, four times, to a question on which it is not sure. It reads the image off first; where two samples
# read differently, their answers differ.

# %%
trained = Trained.load(PACKAGED["packaged-rl"])
sampler = trained.sampler(max_tokens=64)
for question in questions:
    samples = sampler.sample(question, range(4), seed=0)
    if len({extract.extract(sample.text).value for sample in samples}) > 2:
        break
print(question.text, *(sample.text for sample in samples), f"The right answer: {question.answer}", sep="\n")

# %% [markdown]
# ## Votes against self-verification
#
# The same eight samples of each question under all strategies. `best-of@8` asks the model of each sample, with the
# image, whether it is right, and takes the one of highest probability; `[blind+solution]` asks without the image.

# %%
MODES = ("image+solution", "image+answer", "blind+solution", "blind+answer")
strategies = [
    Greedy(),
    *(Majority(n) for n in (1, 2, 4, 8)),
    *(BestOfN(n) for n in (2, 4, 8)),
    *(BestOfN(8, mode=mode) for mode in MODES[1:]),
    WeightedVote(8),
    *(Oracle(n) for n in (1, 2, 4, 8)),
    RandomOf(8),
]


def study(trained):
    """Samples, verdicts and the comparison of one model."""
    return Study(
        questions,
        trained.sampler(max_tokens=64),
        strategies=strategies,
        n=8,
        verifier=verify.Verifier(trained.reader()),
        baseline="majority@8",
    )


run = study(trained)
report = run.run()
for row in report.table:
    print(f"{row.strategy:26} {row.accuracy.mean:.3f} ({row.accuracy.low:.2f} to {row.accuracy.high:.2f})")

# %%
pictures.accuracy_by_tokens(report)

# %% [markdown]
# ## Does it look?
#
# Verdicts with the image and without, by the model after reinforcement and by the one it came from, each on its own
# samples. 0.5 is chance.

# %%
before = study(Trained.load(PACKAGED["packaged-sft"])).run()
pictures.verdicts({"before reinforcement": before, "after": report}, MODES)

# %% [markdown]
# ## Moments of doubt
#
# A fifth of the solutions it learnt from say "Wait" and correct themselves. Do samples that do so come out better? Over
# all samples the comparison says little, for hard questions have more doubts; so: within questions, and by what would
# have been answered just before.

# %%
samples, answers = run.samples(), run.answers()
rows = [
    (question.id, bool(aha.find(sample.text)), grade.correct(answer, question.answer))
    for question in questions
    for sample, answer in zip(samples[question.id], answers[question.id])
]
contrast = aha.contrast(*zip(*rows))
print(f"{contrast.rate:.0%} of samples doubt; right: {contrast.with_marker:.2f}, others {contrast.without_marker:.2f}")
within = contrast.within
print(f"difference within questions: {within.mean:+.2f} ({within.low:+.2f} to {within.high:+.2f})")
changes = [
    change
    for question in questions[:45]
    for change in aha.early_answers(question, samples[question.id], sampler, answer_prefix=" <answer>")
]
print(dict(Counter(change.outcome for change in changes)))

# %% [markdown]
# ## What a budget is best spent on
#
# Strategy and N are chosen on half of the images; what the choice is worth is told on the other half.

# %%
for budget in (100, 300, 1000):
    print(choose(report, budget), end="\n\n")

# %% [markdown]
# ## Traps on the way to a number
#
# Before anything is voted on, an answer has to be found in a text, and public tools differ in what they find:

# %%
text, choices = "Answer: C", {"A": "10", "B": "20", "C": "30", "D": "40"}
for style in ("jaxlab", "lmms-eval", "vlmevalkit", "vlmevalkit-regex"):
    print(f"{style:18} {extract.choice_letter(text, choices, style=style)!r}")
print(grade.answer_key("12.0") == grade.answer_key("12"), grade.relaxed("0.0", "0"), grade.relaxed("105", "100"))

# %% [markdown]
# ## What theory says
#
# With known probabilities all of this has closed forms. Under a verifier that accepts right and wrong samples alike,
# best-of-N is a random sample; votes gain where right answers agree and wrong ones do not:

# %%
drawn, axes = figure(7.0, 3.4)
sizes = (1, 2, 4, 8, 16)
VERIFIERS = {"blind": (0.6, 0.6), "weak": (0.7, 0.5), "good": (0.9, 0.1)}
for label, (tpr, fpr) in VERIFIERS.items():
    model = simulation.Simulation(p=0.4, n_wrong=3, tpr=tpr, fpr=fpr)
    made = Study(
        model.questions(400), model, strategies=[BestOfN(n) for n in sizes], n=16, verifier=model, n_resamples=200
    ).run()
    axes.plot(sizes, list(made.accuracy.values()), marker="o", label=f"best of N, {label} verifier")
votes = Study(model.questions(400), model, strategies=[Majority(n) for n in sizes], n=16, n_resamples=200).run()
axes.plot(sizes, list(votes.accuracy.values()), marker="s", color="black", label="majority of N")
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.set_xlabel("samples")
axes.set_ylabel("accuracy")
axes.set_ylim(0, 1)
axes.legend(frameon=False, fontsize=8)
assert np.isclose(next(iter(votes.accuracy.values())), 0.4, atol=0.08)
drawn
