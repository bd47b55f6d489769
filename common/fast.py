"""FAST action tokens (Pertsch et al. 2025, arXiv 2501.09747), re-implemented from the published description.

A chunk (H, A) in [-1, 1] -> DCT along time -> rounding -> one character per coefficient -> byte-level BPE. The files
are the public ones: tokenizer.json and processor_config.json (scale, min_token)."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from common import UserError, require
from common.checkpoint import read_json
from common.hub import local_folder

NUM_IDS = 2048  # action tokens of the published models; coefficients are characters 0 .. 2047 as well


class FastTokenizer:
    """(H, A) chunk <-> list of ids. Every id stands for fixed bytes of UTF-8 text, one character per DCT coefficient,
    ordered (frequency, dim); ActionsOnly uses this to keep an answer on exactly H*A coefficients."""

    def __init__(self, bpe, scale, min_token):
        self.bpe, self.scale, self.min_token, self.vocab_size = bpe, float(scale), int(min_token), bpe.get_vocab_size()
        self.clipped = 0  # coefficients that had no symbol, since construction
        self.bytes = _token_bytes(bpe)
        self.lead, self.starts, self.tail, self.valid = np.array([_utf8_shape(b) for b in self.bytes]).T  # (V,) each
        closes = (self.valid == 1) & (self.lead == 1) & (self.starts == 0)
        self.valid = (self.valid == 1) & ((self.tail == 0) | closes.any())  # some token must close an open character
        # a coefficient can be coded only if its character survives the round trip: probe, as the file does not say
        codable = np.array([v for v in range(NUM_IDS) if self.text(bpe.encode(chr(v)).ids) == chr(v)])
        require(len(codable), "the FAST tokenizer.json cannot code a single coefficient; expected a byte-level BPE")
        self.nearest = codable[np.abs(codable[:, None] - np.arange(NUM_IDS)).argmin(0)]

    def text(self, ids):
        """One character per coefficient; bytes that are no UTF-8 become U+FFFD."""
        return self.bpe.decode(ids, skip_special_tokens=False)

    @classmethod
    def load(cls, source):
        """From a directory in the public layout or a hub id. No remote code."""
        name = "processor_config.json"
        try:
            folder = local_folder(source, weights=False)
            meta = read_json(folder / name)
            scale, min_token = float(meta["scale"]), int(meta["min_token"])
            name = "tokenizer.json"
            bpe = Tokenizer.from_file(str(folder / name))
        except Exception as error:  # tokenizers raises nothing more specific
            hint = "give a directory (--fast DIR), download it again, or train one on your actions (--fast fit)"
            layout = "the public layout is processor_config.json with scale and min_token, and tokenizer.json"
            raise UserError(f"FAST tokenizer '{source}', {name}: {error}; {layout}: {hint}") from error
        return cls(bpe, scale, min_token)

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = dict(action_dim=None, min_token=self.min_token, processor_class="UniversalActionProcessor")
        about |= dict(scale=self.scale, time_horizon=None, vocab_size=self.vocab_size)
        plain = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
        self.bpe.save(str(folder / "tokenizer.json"))
        (folder / "processor_config.json").write_text(json.dumps(about, indent=2))
        (folder / "tokenizer_config.json").write_text(json.dumps(plain, indent=2))

    @classmethod
    def fit(cls, chunks, scale=10.0, vocab_size=1024):
        """Train on a list of (H, A) chunks. All 256 byte symbols are in the alphabet, so no coefficient can vanish
        (the published fit leaves out bytes it did not see)."""
        sizes = f"256 (one per byte) to {NUM_IDS} (the model's action tokens), and a scale above 0"
        given = f"fast_vocab_size is {vocab_size}, fast_scale is {scale}"
        require(256 <= vocab_size <= NUM_IDS and scale > 0, f"{given}: expected {sizes}")
        quantised = [_quantise(c, scale) for c in chunks]
        low, high = min(q.min() for q in quantised), max(q.max() for q in quantised)
        # room below for actions that the fit did not see: |x| <= 1 bounds a coefficient by scale * sqrt(H)
        low = min(low, -math.ceil(scale * math.sqrt(max(len(c) for c in chunks))))
        spans = f"DCT coefficients span {low}..{high}: actions must be normalised to [-1, 1] before FAST"
        require(high - low < NUM_IDS, spans)
        bpe, texts = ByteLevelBPETokenizer(), ["".join(map(chr, q - low)) for q in quantised]
        bpe.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        return cls(Tokenizer.from_str(bpe.to_str()), scale, low)

    def encode(self, chunk):
        """(H, A) -> ids. A coefficient that has no symbol becomes the nearest that has one, counted in `clipped`."""
        exact = _quantise(np.asarray(chunk, np.float64), self.scale) - self.min_token
        coded = self.nearest[np.clip(exact, 0, NUM_IDS - 1)]
        self.clipped += int((coded != exact).sum())
        return self.bpe.encode("".join(map(chr, coded))).ids

    def decode(self, ids, horizon, dim):
        """ids -> (H, A) float32. Missing coefficients and invalid UTF-8 become zero, surplus ones are dropped; each
        coefficient is clipped to what |x| <= 1 allows, so that a wrong token cannot become a huge motion."""
        count, characters = horizon * dim, np.array([ord(c) for c in self.text(ids)], np.int64)
        q = np.where(characters == 0xFFFD, 0, characters + self.min_token)
        q = np.pad(q[:count], (0, max(0, count - len(q))))
        bound = math.ceil(self.scale * math.sqrt(horizon))
        c = np.clip(q, -bound, bound).reshape(horizon, dim) / self.scale
        return (dct_matrix(horizon).T @ c).astype(np.float32)

    def describe(self, chunks, normalizer, names, show):
        """Print per dimension the error that clipping and FAST leave to a perfect policy, beside that of holding still.
        `chunks`: [((H, A) in data units, is_pad (H,), the row that holds still)]."""
        import pandas as pd  # imported here: it would double the start-up time of the script

        errors, lengths, before = [], [], self.clipped
        for chunk, is_pad, still in chunks:
            unit = normalizer.normalize(chunk)
            ids = self.encode(unit)
            kept = [normalizer.unnormalize(x) for x in (unit, self.decode(ids, *chunk.shape))]
            errors.append(np.abs(np.stack([np.broadcast_to(still, chunk.shape), *kept]) - chunk)[:, ~is_pad])
            lengths.append(len(ids))
        errors, clipped = np.concatenate(errors, axis=1).mean(1, dtype=np.float64), self.clipped - before  # (3, A)
        symbols = f"{clipped} coefficients without a symbol" + (" (--fast fit has them)" if clipped else "")
        size = f"{self.vocab_size} ids; {np.mean(lengths):.1f} tokens per chunk (max {max(lengths)})"
        show(f"FAST      {size}, {symbols}; the error of {len(lengths)} chunks:")
        names, rows = [f"{name} {unit}".strip() for name, unit in names], ["holding still", "clipping", "clip and FAST"]
        show(pd.DataFrame(errors, rows, names).to_string(float_format="{:.4g}".format, line_width=120))
        worst = []
        for name, still, limited, coded in zip(names, *errors, strict=True):
            if coded > 0.5 * still > 0:
                worst.append(f"{name} {coded / still:.0%} (clipping alone {limited / still:.0%})")
        if worst:
            show(f"warning   even a perfect policy keeps this share of the error of holding still: {', '.join(worst)}")
            show("          Use deltas, another horizon, or --fast fit with a larger --fast_scale")


def dct_matrix(n):
    """(n, n) float64 orthonormal DCT-II: coefficients = matrix @ x, x = matrix.T @ coefficients."""
    k, i = np.mgrid[:n, :n]
    return np.sqrt(np.where(k == 0, 1, 2) / n) * np.cos(np.pi * (i + 0.5) * k / n)


def _quantise(chunk, scale):
    """(H, A) -> (H*A,) rounded DCT coefficients in steps of 1/scale, ordered (frequency, dim)."""
    return np.rint(dct_matrix(len(chunk)) @ chunk * scale).astype(np.int64).ravel()


def _token_bytes(bpe):
    """The bytes of every id, by the GPT-2 byte <-> character table of ByteLevel; a token with other characters stands
    for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    return [bytes(table[c] for c in t) if all(c in table for c in t) else t.encode("utf-8") for t in tokens]


def _utf8_shape(b):
    """bytes -> (continuation bytes at the start, characters begun, continuation bytes missing at the end, 1 if usable:
    valid once completed, and of one- and two-byte characters only, coefficients 0..2047)"""
    begun, lead = sum(not 0x80 <= x < 0xC0 for x in b), len(b) - len(b.lstrip(bytes(range(0x80, 0xC0))))
    tail = int(b[-1:] >= b"\xc0")
    try:
        text = (b"\xc3" * lead + b + b"\x80" * tail).decode("utf-8")
        return lead, begun, tail, int(text > "" and max(map(ord, text)) < NUM_IDS)
    except UnicodeDecodeError:
        return lead, begun, tail, 0


class ActionsOnly:
    """Logits processor for greedy generation: allows only action ids that can still add up to exactly `count`
    coefficients, then only the end token. malformed (B,): rows where free decoding would have left that format."""

    def __init__(self, fast, first_action, end, prompts, count):
        self.first, self.end, self.count, self.length = first_action, end, count, prompts.shape[1]
        tables = (fast.valid, fast.lead, fast.starts, fast.tail)
        self.valid, self.lead, self.starts, self.tail = (torch.tensor(t, device=prompts.device) for t in tables)
        self.malformed = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)

    def __call__(self, input_ids, scores):
        answer = input_ids[:, self.length :]
        done = (answer == self.end).any(1)
        ids = (answer - self.first).clamp(0, len(self.valid) - 1)
        remaining = self.count - self.starts[ids].sum(1)
        half = self.tail[ids[:, -1]] if ids.shape[1] else torch.zeros_like(remaining)  # 1: a second byte must follow
        allowed = self.valid & (self.lead == half[:, None]) & (self.starts <= remaining[:, None])
        finished = done | (remaining == 0) & (half == 0)
        masked, actions = torch.full_like(scores, -torch.inf), slice(self.first, self.first + len(self.valid))
        masked[:, actions] = scores[:, actions].masked_fill(~allowed | finished[:, None], -torch.inf)
        masked[:, self.end] = torch.where(finished, scores[:, self.end], -torch.inf)
        self.malformed |= ~done & (scores.argmax(-1) != masked.argmax(-1))
        return masked
