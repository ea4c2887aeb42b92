"""Stop strings, token by token, against a reference that decodes the whole output and searches it each time."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolloutd.engine.engine import decoder_of
from rolloutd.engine.sequence import Group, Request, Sequence
from rolloutd.engine.stop import REPLACEMENT, Decode, Finish, check_stop
from rolloutd.sampling_params import SamplingParams
from tests.tiny_models import EOS, build_tokenizer

PROMPT = (7, 8)
STOP_ID = 3


@cache
def tokenizer() -> Any:
    return build_tokenizer(32_768)  # pairs of any two bytes, whole characters or not


@cache
def vocab() -> dict[str, int]:
    entries: dict[str, int] = tokenizer().get_vocab()
    return entries


@cache
def decoder() -> Decode:
    decode = decoder_of(tokenizer())
    assert decode is not None
    return decode


def ids_of(data: bytes) -> list[int]:
    """Return one token per byte."""
    return [vocab()[byte_alphabet()[byte]] for byte in data]


@cache
def byte_alphabet() -> dict[int, str]:
    """Return the character that byte-level tokenizers write for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def sequence_of(params: SamplingParams) -> Sequence:
    group = Group.from_request(Request("r", PROMPT, params), seed=0, eos_token_ids=frozenset({STOP_ID}))
    return group.spawn()


def run(output: list[int], **params: Any) -> tuple[int, Finish | None]:
    """Return after how many tokens the output ends, and how."""
    sequence = sequence_of(SamplingParams(**{"max_tokens": max(1, len(output)), "ignore_eos": True, **params}))
    for count, token_id in enumerate(output, 1):
        sequence.token_ids.append(token_id)
        finish = check_stop(sequence, decoder())
        if finish is not None:
            return count, finish
    return len(output), None


def reference(output: list[int], stops: list[str], min_tokens: int, *, include: bool) -> tuple[int, str, str] | None:
    """Return tokens, stop string and text: the first match that was not there a token ago and may end the output."""
    before = ""
    for count in range(1, len(output) + 1):
        text = decoder()(output[:count]).rstrip(REPLACEMENT)
        assert text.startswith(before)
        hits = [
            (at, stop)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > len(before)
        ]
        before = text
        if hits and count >= min_tokens:
            at, stop = min(hits)
            return count, stop, text[: at + len(stop)] if include else text[:at]
    return None


PIECES = [b"ab", b"abc", b"a", b"b", "é".encode(), "€".encode(), "🙂".encode(), b"\xe2\x82", b"\xff", b"\xf0\x9f", b" "]
STOPS = ["a", "ab", "abc", "bca", "ba", "é", "€a", "🙂", "b🙂", "aé", " a", "never"]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_stops_are_those_of_the_whole_text(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    output: list[int] = []
    for _ in range(rng.randrange(1, 12)):
        match rng.randrange(6):
            case 0:
                output.append(rng.randrange(len(vocab())))  # any token, special ones and merges of bytes too
            case 1:
                output += tokenizer().encode(rng.choice(STOPS) + rng.choice(STOPS), add_special_tokens=False)
            case 2:
                output.append(tokenizer().convert_tokens_to_ids(EOS))
            case _:
                output += ids_of(rng.choice(PIECES))
    stops = rng.sample(STOPS, rng.randrange(1, 5))
    min_tokens = min(rng.choice([0, 0, 1, 3, 12]), len(output))
    include = rng.random() < 0.5
    expected = reference(output, stops, min_tokens, include=include)
    count, finish = run(output, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include)
    assert finish is not None
    if expected is None:
        assert finish == Finish("length")
        assert count == len(output)
    else:
        assert (count, finish.stop_reason, finish.text) == expected
        assert finish.reason == "stop"


@pytest.mark.parametrize(
    ("output", "stop", "count", "text"),
    [
        (b"xaby", "ab", 3, "x"),  # over two tokens
        ("x€y".encode(), "€", 4, "x"),  # a character of three tokens
        (b"x\xe2\x82", "x", 1, ""),  # before a character that never comes
        (b"\xe2\x82xab", "ab", 5, "\ufffdx"),  # after one that never came
        (b"aab", "aab", 3, ""),  # at the very last token
        (b"aaab", "aab", 4, "a"),  # a false start
    ],
)
def test_by_hand(output: bytes, stop: str, count: int, text: str) -> None:
    found, finish = run(ids_of(output), stop=stop)
    assert (found, finish) == (count, Finish("stop", stop, text))


def test_a_stop_string_inside_one_token() -> None:
    token = vocab()["et"]
    assert run([*ids_of(b"x"), token], stop=["t"]) == (2, Finish("stop", "t", "xe"))
    assert run([token], stop=["t", "e"]) == (1, Finish("stop", "e", "")), "the first in the text"
    assert run([token], stop=["et", "e"]) == (1, Finish("stop", "e", "")), "the shorter of two"


def test_a_token_that_ends_inside_a_character_does_not_hide_a_stop() -> None:
    """The token holds the stop string and the first byte of a character that is never completed."""
    token = vocab()["e" + byte_alphabet()[0xE2]]
    assert run([*ids_of(b"h"), token, *ids_of(b"xyz")], stop="he") == (2, Finish("stop", "he", ""))
    euro = [token, *ids_of(b"\x82\xac")]
    assert run([*euro, *ids_of(b"xyz")], stop="€x") == (4, Finish("stop", "€x", "e"))


def test_min_tokens_lets_a_stop_pass_once_and_for_all() -> None:
    output = ids_of(b"abxxxxab")
    assert run(output, stop=["ab", "a-long-one-that-reaches-back"], min_tokens=3) == (8, Finish("stop", "ab", "abxxxx"))
    assert run(output, stop=["ab"], min_tokens=2) == (2, Finish("stop", "ab", ""))


def test_the_stop_string_is_kept_on_request_and_nothing_after_it() -> None:
    output = [*ids_of(b"x"), vocab()["et"]]
    assert run(output, stop="e", include_stop_str_in_output=True) == (2, Finish("stop", "e", "xe"))


def test_special_tokens_have_no_text() -> None:
    special = tokenizer().convert_tokens_to_ids(EOS)
    assert run([*ids_of(b"xa"), special, *ids_of(b"b")], stop="ab") == (4, Finish("stop", "ab", "x"))
    assert run([*ids_of(b"xa"), special], stop=EOS) == (3, Finish("length"))


def test_a_stop_token_precedes_a_stop_string_and_length() -> None:
    output = [*ids_of(b"x"), STOP_ID]
    text = decoder()([STOP_ID])
    assert run(output, stop=text, ignore_eos=False) == (2, Finish("stop", STOP_ID))


def test_only_new_tokens_are_decoded() -> None:
    """A completion of 2,000 tokens costs a bounded number of decoded tokens for each."""
    longest = 0

    def counted(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decoder()(ids)

    sequence = sequence_of(SamplingParams(max_tokens=2_000, stop="never", ignore_eos=True))
    for token_id in ids_of("a€b".encode()) * 400:
        sequence.token_ids.append(token_id)
        check_stop(sequence, counted)
    assert longest <= 8
