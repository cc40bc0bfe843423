"""What the choice of a token is worth: the words that could stand in its place, and how often a completion succeeds behind each.

V(prefix) is the probability that the policy, drawing on from there, succeeds. A branch is one word behind a prefix; its value is
V(prefix + word), estimated from independent continuations. The prefix's own value is the mean of its branches' values under the
policy, and what a word gains is the difference of the two: the advantage of that action in the sense of RL.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.draw import Decoding, Drawn, draw, end_ids, next_words
from rl.errors import ConfigError
from rl.estimators import combined_interval, vote, wilson_interval
from rl.scoring import look

Answers = Callable[[list[str]], list[str | None]]
Grade = Callable[[list[str]], list[bool]]

_REST = (
    1e-3  # of less probability, the words left over are not drawn from: they could move a value by no more than this
)
_COMPLETION, _CONTINUATIONS, _REST_WORDS = 0, 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Sample:
    """One continuation: its text, its word included, whether it went well (None: unknown), and whether it ran out of tokens."""

    text: str
    right: bool | None
    truncated: bool


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where success is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Branch:
    """One word in a place.

    Attributes:
        token: its id, None for all words together that are no branch of their own. prob: of the decoding, top_p and the like
            applied. taken: by the completion.
        over: the completion ends with this word, by itself or for want of tokens: one sample, and the value is exact.
        samples: of the text from this word on.
        gain: value of this branch - value of the place.
        answers: the most frequent answers and how many samples gave them, at most three. distinct: how many different ones.
    """

    token: int | None
    text: str
    prob: float
    taken: bool
    over: bool
    n: int
    right: int
    value: Estimate
    gain: Estimate
    answers: list[tuple[str | None, int]]
    distinct: int
    samples: list[Sample]


@dataclass(frozen=True)
class Fork:
    """A place of the completion, counted from 0.

    Attributes:
        entropy, logp: nats, at the temperature, before top_p and the like; rank: of the token taken, 1 the most likely.
        value: of the prefix, the branches' values weighted by their probabilities.
        spread: largest - smallest value of the words shown; chance alone makes it positive.
    """

    place: int
    entropy: float
    logp: float
    rank: int
    value: Estimate
    spread: float
    branches: list[Branch]


@dataclass(frozen=True)
class Study:
    """A completion with its forks, in the order of the text.

    Attributes:
        tokens: their texts, which together are that of the completion, its end included. entropy: of each, nats.
        measure: what counts as success: "correct" (a grader says so), "majority" (the most frequent answer of the samples of
            the prompt, which is ``majority``), or "unknown".
        start: V(prompt), from completions of their own.
    """

    tokens: list[str]
    entropy: list[float]
    completion: str
    right: bool | None
    truncated: bool
    measure: str
    majority: str | None
    start: Estimate
    forks: list[Fork]


@dataclass(frozen=True)
class Options:
    """How many places, words a place and continuations a word; ``max_new_tokens`` of a continuation, None for what is left.

    Raises:
        ConfigError: a value out of range.
    """

    tokens: int = 6
    branches: int = 5
    samples: int = 32
    seed: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("branches", 2), ("samples", 2), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if name == "max_new_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                or_null = ", or null" if name == "max_new_tokens" else ""
                raise ConfigError(
                    f"forks.{name}={value} does not work. Expected a whole number of at least {least}{or_null}."
                )


def check_temperature(temperature: float) -> None:
    """Raise ConfigError for greedy decoding, under which all continuations are the same."""
    if temperature == 0:
        raise ConfigError(
            "eval.temperature=0 is greedy: every continuation would be the same, and no other word has a probability. "
            "Raise eval.temperature; forks.completion=greedy looks at the greedy completion."
        )


def draw_completion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], decoding: Decoding, seed: int
) -> list[int]:
    """The token ids of one completion, its end included."""
    check_prompt(prompt)
    return draw(model, tokenizer, [prompt], decoding, 1, _stream(seed, _COMPLETION))["token_ids"][0].tolist()


def check_prompt(prompt: list[int]) -> None:
    """Raise ConfigError for a prompt without tokens."""
    if not prompt:
        raise ConfigError("The prompt has no tokens, so there is nothing to go on from. Give one with text in it.")


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    completion: list[int],
    decoding: Decoding,
    options: Options,
    answers: Answers,
    grade: Grade | None = None,
    progress: Callable[[Drawn], None] | None = None,
) -> Study:
    """Branch a completion where its entropy is highest, and see where the branches lead.

    Args:
        prompt, completion: token ids; the completion with its end. grade: says of whole completions whether they are right;
            without it, one is right that gives the most frequent answer of the samples of the prompt.

    Raises:
        ConfigError: a prompt or a completion without tokens, more branches than words, or a decoding that leaves no choice.
    """
    check_temperature(decoding.temperature)
    check_prompt(prompt)
    ends = set(end_ids(model, tokenizer))
    if completion[0] in ends:
        raise ConfigError(
            "The completion ends at once: its first token is the end of text, and there is no place to branch. Draw another "
            "with forks.seed, or take another problem."
        )
    ids = torch.tensor([prompt + completion], device=model.device)
    looked = look(model, ids, torch.ones_like(ids), len(completion), decoding.temperature, k=1)
    entropy = looked.entropy[0].tolist()
    places = _places(model, tokenizer, prompt, completion, entropy, decoding, options)
    whole = _Arm(None, 1.0, [[]] * options.samples, decoding.max_new_tokens)  # completions of the prompt itself
    tails = _draw(
        model, tokenizer, prompt, [whole, *(a for _, arms in places for a in arms)], decoding, options, progress
    )
    texts = [
        tokenizer.decode(x, skip_special_tokens=True) for x in [completion, *(t.ids for tail in tails for t in tail)]
    ]
    verdict = _judge(texts, options.samples, answers, grade)
    seen, start = 1 + options.samples, _estimate(verdict.right[1 : 1 + options.samples])
    forks, drawn = [], iter(tails[1:])
    for at, arms in places:
        branches = []
        for arm in arms:
            tail = next(drawn)
            branches.append(_branch(tokenizer, arm, at, completion[at], tail, verdict, seen))
            seen += len(tail)
        measured = {"entropy": entropy[at], "logp": float(looked.logp[0, at]), "rank": int(looked.rank[0, at])}
        forks.append(_fork(at, measured, branches))
    return Study(
        tokens=_pieces(tokenizer, completion),
        entropy=entropy,
        completion=texts[0],
        right=verdict.right[0],
        truncated=completion[-1] not in ends,
        measure=verdict.measure,
        majority=verdict.majority,
        start=start,
        forks=forks,
    )


class _Arm(NamedTuple):
    """A branch before anything is drawn: for each sample the tokens of the completion to go on from, and how many more at most."""

    token: int | None
    prob: float
    prefixes: list[list[int]]
    limit: int


class _Tail(NamedTuple):
    """A completion with a sampled end."""

    ids: list[int]
    truncated: bool


class _Verdict(NamedTuple):
    """Of all texts in order: right or not, None where that is unknown, and their answers."""

    measure: str
    majority: str | None
    right: list[bool | None]
    answers: list[str | None]


def _places(
    model, tokenizer, prompt: list[int], completion: list[int], entropy: list[float], decoding, options: Options
) -> list[tuple[int, list[_Arm]]]:
    """The places of highest entropy at which the decoding leaves a choice, in the order of the text, each with its branches."""
    chosen = sorted(sorted(range(len(completion)), key=lambda at: -entropy[at])[: options.tokens])
    probs = next_words(model, tokenizer, [prompt + completion[:at] for at in chosen], decoding)
    if options.branches > probs.shape[1]:
        raise ConfigError(
            f"forks.branches={options.branches} is more than the {probs.shape[1]:,} words of the model. Ask for fewer."
        )
    random = torch.Generator().manual_seed(_stream(options.seed, _REST_WORDS))
    found = []
    for at, p in zip(chosen, probs, strict=True):
        if int((p > 0).sum()) < 2:
            continue
        left = decoding.max_new_tokens - at - 1
        limit = left if options.max_new_tokens is None else options.max_new_tokens
        found.append((at, _arms(completion[:at], completion[at], p, limit, options, random)))
    if not found:
        raise ConfigError(
            "The decoding leaves one word at every place, so nothing branches. Raise eval.temperature, eval.top_p or eval.top_k."
        )
    return found


def _arms(before: list[int], taken: int, probs: Tensor, limit: int, options: Options, random) -> list[_Arm]:
    """The most likely words and the one that was taken, most likely first; then all others together if they weigh anything."""
    words = probs.topk(min(options.branches, int((probs > 0).sum()))).indices.tolist()
    if taken not in words:
        words = [*words[: options.branches - 1], taken]
    words.sort(key=lambda word: -float(probs[word]))
    arms = [_Arm(word, float(probs[word]), [[*before, word]] * options.samples, limit) for word in words]
    left = probs.clone()
    left[words] = 0
    if (rest := float(left.sum())) >= _REST:
        others = torch.multinomial(left, options.samples, replacement=True, generator=random).tolist()
        arms.append(_Arm(None, rest, [[*before, word] for word in others], limit))
    return arms


def _draw(model, tokenizer, prompt, arms: Sequence[_Arm], decoding, options: Options, progress) -> list[list[_Tail]]:
    """Each arm's samples. All are drawn together, to the longest limit, and then cut: a token does not depend on later ones."""
    ends = set(end_ids(model, tokenizer))
    flat = [(prefix, arm.limit) for arm in arms for prefix in arm.prefixes]
    tails = [_Tail(prefix, not prefix or prefix[-1] not in ends) for prefix, _ in flat]
    going = [i for i, (_, limit) in enumerate(flat) if limit > 0 and tails[i].truncated]
    longest = replace(decoding, max_new_tokens=max(flat[i][1] for i in going))
    prefixes = [prompt + flat[i][0] for i in going]
    drawn = draw(model, tokenizer, prefixes, longest, 1, _stream(options.seed, _CONTINUATIONS), progress=progress)
    for i, ids in zip(going, drawn["token_ids"], strict=True):
        prefix, limit = flat[i]
        cut = ids[:limit].tolist()
        tails[i] = _Tail(prefix + cut, cut[-1] not in ends)
    left = iter(tails)
    return [[next(left) for _ in arm.prefixes] for arm in arms]


def _judge(texts: list[str], samples: int, answers: Answers, grade: Grade | None) -> _Verdict:
    """Which completions are right. ``texts[1 : 1 + samples]`` are those of the prompt itself, which vote where nobody knows."""
    given = answers(texts)
    if grade is not None:
        return _Verdict("correct", None, grade(texts), given)
    winner = vote(given[1 : 1 + samples])
    if winner is None:
        return _Verdict("unknown", None, [None] * len(texts), given)
    majority = given[1 + winner]
    return _Verdict("majority", majority, [answer == majority for answer in given], given)


def _branch(tokenizer, arm: _Arm, at: int, taken: int, tails: list[_Tail], verdict: _Verdict, first: int) -> Branch:
    """What came of an arm. Args: first: where its samples begin in the verdict."""
    over = arm.token is not None and all(len(t.ids) == at + 1 for t in tails)  # with this word, so there is one outcome
    tails = tails[:1] if over else tails
    right = verdict.right[first : first + len(tails)]
    answers = Counter(verdict.answers[first : first + len(tails)])
    return Branch(
        token=arm.token,
        text="" if arm.token is None else tokenizer.decode([arm.token]),
        prob=arm.prob,
        taken=arm.token == taken,
        over=over,
        n=len(tails),
        right=sum(map(bool, right)),
        value=_estimate(right, over),
        gain=Estimate(math.nan, math.nan, math.nan),  # known only beside the others
        answers=answers.most_common(3),
        distinct=len(answers),
        samples=[
            Sample(tokenizer.decode(t.ids[at:], skip_special_tokens=True), ok, t.truncated)
            for t, ok in zip(tails, right, strict=True)
        ],
    )


def _fork(at: int, measured: dict, branches: list[Branch]) -> Fork:
    """The place as a whole, and what each of its words gains on it."""
    probs = np.array([b.prob for b in branches])
    probs = probs / probs.sum()
    rates, lows, highs = ([getattr(b.value, name) for b in branches] for name in ("value", "low", "high"))

    def combined(weights: np.ndarray) -> Estimate:
        return Estimate(float(weights @ np.array(rates)), *combined_interval(weights, rates, lows, highs))

    gains = [combined(one - probs) for one in np.eye(len(branches))]
    words = [b.value.value for b in branches if b.token is not None]
    return Fork(
        place=at,
        **measured,
        value=combined(probs),
        spread=max(words) - min(words),
        branches=[replace(b, gain=gain) for b, gain in zip(branches, gains, strict=True)],
    )


def _pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token as it stands in the text, the space before it included."""
    pieces = []
    for i in range(len(ids)):
        start = max(0, i - 8)  # as far as a character of several tokens reaches
        before = tokenizer.decode(ids[start:i])
        whole = tokenizer.decode(ids[start : i + 1])
        pieces.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([ids[i]]))
    return pieces


def _estimate(right: Sequence[bool | None], exact: bool = False) -> Estimate:
    if None in right:
        return Estimate(math.nan, math.nan, math.nan)
    rate = sum(right) / len(right)
    return Estimate(rate, rate, rate) if exact else Estimate(rate, *wilson_interval(sum(right), len(right)))


def _stream(seed: int, number: int) -> int:
    """Seeds that have nothing to do with each other."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
