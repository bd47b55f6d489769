"""common/fast.py against values worked by hand, the published class, `tokenizers`, and all that a model may answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer

from common import UserError
from common.fast import NUM_IDS, ActionsOnly, FastTokenizer, _utf8_shape, dct_matrix

ROOT2 = math.sqrt(2)


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer.fit(smooth(np.random.default_rng(1), 400, 10, 6, 1.0), vocab_size=600)


def published_fit(chunks, scale=10.0, vocab_size=300):
    """The fit of the released processor: the alphabet is chr(0..max-min), so bytes that no coefficient used have no
    token."""
    q = [np.rint(dct_matrix(len(c)) @ c * scale).astype(int).ravel() for c in chunks]
    low, high = min(x.min() for x in q), max(x.max() for x in q)
    inner = ByteLevelBPETokenizer()._tokenizer
    settings = dict(vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[])
    alphabet = [chr(i) for i in range(high - low + 1)]
    trainer = BpeTrainer(**settings, max_token_length=10000, initial_alphabet=alphabet)
    inner.train_from_iterator(["".join(map(chr, x - low)) for x in q], trainer)
    return FastTokenizer(inner, scale, low)


def smooth(rng, count, horizon, dim, size):
    return list(size * np.cumsum(rng.normal(0, 0.2, (count, horizon, dim)), axis=1).clip(-1, 1))


@pytest.fixture(scope="module")
def tokenizers(fast):
    """Three alphabets: all bytes; one-byte characters only; mostly two-byte characters."""
    rng = np.random.default_rng(0)
    wide = published_fit(smooth(rng, 300, 8, 2, 1.0), scale=60)
    assert wide.nearest.max() > 200
    return {"all bytes": fast, "narrow": published_fit(smooth(rng, 300, 4, 2, 0.3)), "wide": wide}


KINDS = ("all bytes", "narrow", "wide")


def coefficients(fast, ids):
    return [ord(c) + fast.min_token for c in fast.text(ids)]


def ids_of(fast, values):
    return fast.bpe.encode("".join(chr(v - fast.min_token) for v in values)).ids


# ---- DCT and encoding ------------------------------------------------------------------------------------------------
def test_the_dct_by_hand_and_orthonormal():
    np.testing.assert_allclose(dct_matrix(2), np.array([[1, 1], [1, -1]]) / ROOT2, atol=1e-15)
    # H = 3: cos(pi/6) = sqrt(3)/2, cos(pi/3) = 1/2; scales sqrt(1/3), sqrt(2/3)
    third, sixth = 1 / math.sqrt(3), 1 / math.sqrt(6)
    rows = [[third] * 3, [1 / ROOT2, 0, -1 / ROOT2], [sixth, -2 * sixth, sixth]]
    np.testing.assert_allclose(dct_matrix(3), rows, atol=1e-15)
    for n in (1, 5, 50):
        np.testing.assert_allclose(dct_matrix(n) @ dct_matrix(n).T, np.eye(n), atol=1e-13)


def test_coefficients_are_ordered_by_frequency_then_dim(fast):
    """By hand: sums and differences over sqrt(2), times 10: (.5 + .1) -> 4.24, (-.3 + .7) -> 2.83, (.5 - .1) -> 2.83,
    (-.3 - .7) -> -7.07."""
    chunk = np.array([[0.5, -0.3], [0.1, 0.7]])
    assert coefficients(fast, fast.encode(chunk)) == [4, 3, 3, -7]
    x = fast.decode(fast.encode(chunk), 2, 2)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, np.array([[7, -4], [1, 10]]) / ROOT2 / 10, atol=1e-6)


def test_one_step_is_the_identity_rounded_half_to_even_in_steps_of_the_scale(fast):
    chunk = np.array([[0.25, 0.35, -0.25, 0.05, 0.15, -0.35, 0.24, 1.0, -1.0]])
    assert coefficients(fast, fast.encode(chunk)) == [2, 4, -2, 0, 2, -4, 2, 10, -10]
    finer = FastTokenizer(fast.bpe, 20, fast.min_token)
    assert coefficients(finer, finer.encode(np.array([[0.5, -0.33]]))) == [10, -7]
    np.testing.assert_allclose(finer.decode(finer.encode(np.array([[0.5, -0.33]])), 1, 2), [[0.5, -0.35]])


@pytest.mark.parametrize("kind", KINDS)
def test_encode_codes_every_coefficient(tokenizers, kind):
    """Also far outside of what was fitted: the nearest one that has a symbol, every change counted."""
    fast, rng = tokenizers[kind], np.random.default_rng(1)
    codable = {v + fast.min_token for v in range(2048) if fast.text(fast.bpe.encode(chr(v)).ids) == chr(v)}
    for size in (0.1, 1.0, 5.0):
        x = rng.normal(0, size, (5, 3))
        wanted, before = np.rint(dct_matrix(5) @ x * fast.scale).astype(int).ravel(), fast.clipped
        got = coefficients(fast, fast.encode(x))
        nearest = [min(abs(c - w) for c in codable) for w in wanted]
        assert [abs(g - w) for g, w in zip(got, wanted, strict=True)] == nearest
        assert fast.clipped - before == sum(g != w for g, w in zip(got, wanted, strict=True))


# ---- decoding --------------------------------------------------------------------------------------------------------
def test_short_is_filled_with_zero_coefficients_and_long_is_cut(fast):
    x = fast.decode(ids_of(fast, [4, 3, 3]), 2, 2)
    np.testing.assert_allclose(x, np.array([[7, 3], [1, 3]]) / ROOT2 / 10, atol=1e-6)
    x = fast.decode(ids_of(fast, [4, 3, 3, -7, 9, 9]), 2, 2)
    np.testing.assert_array_equal(x, fast.decode(ids_of(fast, [4, 3, 3, -7]), 2, 2))
    x = fast.decode([], 3, 2)
    assert x.shape == (3, 2) and not x.any()


def byte(fast, value):
    return fast.bytes.index(bytes([value]))


# open, stray, never, cut 3-byte, overlong, surrogate, U+FFFD itself
@pytest.mark.parametrize("broken", ["c3", "80", "ff", "e180", "c080", "eda080", "efbfbd"])
def test_broken_utf8_becomes_zero(fast, broken):
    """The published decoder reads the replacement character as coefficient 65533 + min_token: a motion of thousands."""
    x = fast.decode([*ids_of(fast, [5]), *(byte(fast, b) for b in bytes.fromhex(broken))], 1, 2)
    np.testing.assert_allclose(x, [[0.5, 0.0]], atol=1e-6)


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 10**6), max_size=40), st.integers(1, 12), st.integers(1, 7))
def test_no_answer_is_a_huge_motion(tokenizers, kind, numbers, horizon, dim):
    """Any ids: a chunk whose coefficients |x| <= 1 can have; and what the rule takes for the bytes of an id is so."""
    fast = tokenizers[kind]
    ids = [n % fast.vocab_size for n in numbers]
    x = fast.decode(ids, horizon, dim)
    assert x.shape == (horizon, dim) and x.dtype == np.float32
    assert np.abs(dct_matrix(horizon) @ x * fast.scale).max() <= math.ceil(fast.scale * math.sqrt(horizon)) + 1e-3
    text = b"".join(fast.bytes[i] for i in ids).decode("utf-8", errors="replace")
    assert text == fast.text(ids)


# ---- files and fit ---------------------------------------------------------------------------------------------------
def test_saved_and_loaded_gives_the_same_ids_also_in_transformers(tmp_path, tokenizers):
    from transformers import PreTrainedTokenizerFast

    for kind, fast in tokenizers.items():
        fast.save(tmp_path / kind)
        again, wrapped = FastTokenizer.load(tmp_path / kind), PreTrainedTokenizerFast.from_pretrained(tmp_path / kind)
        assert (again.scale, again.min_token, again.bytes) == (fast.scale, fast.min_token, fast.bytes)
        for seed in range(10):
            ids = fast.encode(np.random.default_rng(seed).normal(0, 0.5, (8, 2)))
            np.testing.assert_array_equal(again.decode(ids, 8, 2), fast.decode(ids, 8, 2))
            text = wrapped.decode(ids, clean_up_tokenization_spaces=False)
            assert [ord(c) + fast.min_token for c in text] == coefficients(fast, ids)
            assert wrapped(text)["input_ids"] == ids


def test_the_published_class_gives_the_same_ids_and_chunks(shared):
    """Fitted, saved and used by the published processor: our ids and chunks of its 300 chunks."""
    folder = shared / "fixtures" / "fast_upstream"
    fast, io = FastTokenizer.load(folder / "model"), np.load(folder / "io.npz")
    assert (fast.scale, fast.min_token, fast.vocab_size) == (10, -354, 2048)
    for k in range(300):
        x, ids, chunk = io[f"x{k}"], io[f"i{k}"].tolist(), io[f"d{k}"]
        assert fast.encode(x) == ids, k
        np.testing.assert_allclose(fast.decode(ids, *x.shape), chunk, atol=1e-6)
    assert fast.clipped == 0


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, fast, name):
    """A git-lfs pointer instead of the file is the usual way to get here."""
    fast.save(tmp_path)
    for content in ("version https://git-lfs.github.com/spec/v1", "{}", "[]", None):
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"'{tmp_path}', {name}.*--fast fit"):
            FastTokenizer.load(tmp_path)


@pytest.mark.parametrize("horizon,dim,scale,size", [(1, 6, 10, 256), (10, 6, 10, 512), (16, 2, 25, 300)])
def test_a_fitted_tokenizer_codes_every_normalised_chunk(horizon, dim, scale, size):
    """Also the largest motions: all ones is one coefficient of scale * sqrt(H), exactly the bound of decode."""
    rng = np.random.default_rng(0)
    fast = FastTokenizer.fit(smooth(rng, 100, horizon, dim, 0.2), scale, size)
    assert fast.vocab_size <= size and (fast.nearest == np.arange(2048)).all()
    ones = np.ones((horizon, dim))
    for chunk in (rng.uniform(-1, 1, (horizon, dim)), ones, -ones, rng.choice([-1.0, 1.0], (horizon, dim))):
        x = fast.decode(fast.encode(chunk), horizon, dim)
        assert np.abs(dct_matrix(horizon) @ (x - chunk)).max() <= 0.5 / scale + 1e-6
    assert fast.clipped == 0


def test_fit_refuses_what_cannot_work():
    for size in (255, NUM_IDS + 1):
        with pytest.raises(UserError, match=f"fast_vocab_size is {size}, .*: expected 256 .* to 2048"):
            FastTokenizer.fit([np.zeros((1, 1))], 10, size)
    with pytest.raises(UserError, match="must be normalised"):
        FastTokenizer.fit([np.array([[0.0, 300.0]])], 10, 256)


# ---- constrained generation ------------------------------------------------------------------------------------------

FIRST, END = 7, 3  # <robot_action_0>, <|im_end|>


def rule(fast, count, rows=1):
    return ActionsOnly(fast, FIRST, END, torch.zeros(rows, 5, dtype=torch.long), count)


def answer(ids):
    return torch.tensor([[0] * 5 + [FIRST + i for i in ids]])


@settings(max_examples=150)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**32 - 1), st.booleans())
def test_whatever_the_model_wants_the_answer_decodes_ok(tokenizers, kind, horizon, dim, seed, favour_open):
    """No dead end, at most two tokens per coefficient, exactly H * A coefficients, valid UTF-8, then the end."""
    fast, rng = tokenizers[kind], np.random.default_rng(seed)
    only, ids = rule(fast, horizon * dim), []
    for _ in range(2 * horizon * dim + 1):
        scores = torch.from_numpy(rng.normal(size=(1, FIRST + fast.vocab_size + 4)))
        if favour_open:  # the hardest way: break every character in two
            scores[:, FIRST : FIRST + fast.vocab_size] += 9 * torch.from_numpy(fast.tail == 1)
        token = int(only(answer(ids), scores).argmax(-1))
        if token == END:
            break
        ids.append(token - FIRST)
    assert token == END and len(fast.text(ids)) == horizon * dim and "\ufffd" not in fast.text(ids)


@given(st.sampled_from(KINDS), st.integers(1, 10), st.integers(1, 7), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_every_answer_of_the_training_data_is_allowed(tokenizers, kind, horizon, dim, seed, size):
    """A target that the rule forbids could never be generated; where it is wanted nothing is malformed."""
    fast = tokenizers[kind]
    ids = fast.encode(np.random.default_rng(seed).normal(0, size, (horizon, dim)))
    only = rule(fast, horizon * dim)
    for k, token in enumerate([*(FIRST + i for i in ids), END]):
        scores = torch.zeros(1, FIRST + fast.vocab_size)
        scores[0, token] = 1
        assert only(answer(ids[:k]), scores).argmax(-1).item() == token
    assert not only.malformed.any()


def test_malformed_is_where_free_decoding_would_have_left_the_format(fast):
    only, scores = rule(fast, 2, rows=2), torch.zeros(2, FIRST + fast.vocab_size)
    scores[0, END], scores[1, FIRST + ids_of(fast, [4])[0]] = 1, 1  # the end at once; a coefficient
    only(torch.zeros(2, 5, dtype=torch.long), scores)
    assert only.malformed.tolist() == [True, False]


def test_a_character_beyond_the_coefficients_is_no_coefficient():
    assert _utf8_shape("\u07ff".encode())[3] == 1 and _utf8_shape("\u0800".encode())[3] == 0
