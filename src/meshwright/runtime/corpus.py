"""Training data: text files, memory-mapped token files, and the corpus that is always there.

Rows are cut from the token stream end to end, `sequence` tokens each, and visited in an order that
is shuffled anew in every epoch. Which row is which depends on the seed alone, never on the plan.
"""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import DataError, Problem
from meshwright.files import check_input, said
from meshwright.records import record

BYTE_VOCABULARY = 256
STANDARD_LIBRARY = "python-standard-library"
Tokens = NDArray[np.integer]


@record
class Corpus:
    """A stream of tokens."""

    name: str
    tokens: Tokens
    """One-dimensional; may be a memory map."""


def open_corpus(source: str | Path | None, vocabulary: int) -> Corpus:
    """`None`: the source of Python's standard library. `*.bin`: raw token numbers (uint16, or
    uint32 for vocabularies beyond 65,536), `*.npy`: a one-dimensional integer array, both memory
    mapped like all files. Anything else: a text file, one token per byte. Raises DataError.
    """
    if vocabulary < BYTE_VOCABULARY and (source is None or _is_text(Path(source))):
        wanted = f"a vocabulary of at least {BYTE_VOCABULARY}: text is read byte by byte"
        raise DataError(Problem(str(source or STANDARD_LIBRARY), "", f"{vocabulary}", wanted))
    if source is None or source == STANDARD_LIBRARY:
        return Corpus(name=STANDARD_LIBRARY, tokens=_standard_library())
    path = Path(source)
    check_input(path, error=DataError)
    try:
        if path.suffix == ".bin":
            tokens = _memory_map(path, np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32))
        elif path.suffix == ".npy":
            tokens = _array(path)
        else:
            tokens = _memory_map(path, np.dtype(np.uint8))
    except OSError as failure:
        raise DataError(Problem(str(path), "", said(failure), "a readable file")) from None
    return Corpus(name=str(path), tokens=tokens)


def _is_text(path: Path) -> bool:
    return path.suffix not in (".bin", ".npy")


def _memory_map(path: Path, dtype: np.dtype[np.unsignedinteger]) -> Tokens:
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        wanted = f"a positive multiple of {dtype.itemsize}: {dtype.name} tokens"
        raise DataError(Problem(str(path), "", f"{size} bytes", wanted))
    return np.memmap(path, dtype=dtype, mode="r")


def _array(path: Path) -> Tokens:
    wanted = "a saved numpy array"
    try:
        tokens: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError) as failure:
        raise DataError(Problem(str(path), "", str(failure), wanted)) from None
    if not isinstance(tokens, np.ndarray):  # an archive of several
        raise DataError(Problem(str(path), "", type(tokens).__name__, wanted))
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} array of shape {tokens.shape}"
        raise DataError(Problem(str(path), "", found, "a one-dimensional integer array"))
    return tokens


@lru_cache
def _standard_library() -> Tokens:
    """Every module of the standard library on this machine, in order of name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    return np.frombuffer(b"".join(p.read_bytes() for p in modules), dtype=np.uint8)


def check_corpus(corpus: Corpus, *, sequence: int, global_batch: int) -> None:
    """Raise DataError if the corpus holds less than one batch."""
    needed = sequence * global_batch + 1
    if len(corpus.tokens) < needed:
        raise DataError(
            Problem(
                corpus.name,
                "",
                f"{len(corpus.tokens)} tokens",
                f"at least {needed}: one batch of {global_batch} rows of {sequence} tokens",
                "use more text, a smaller global batch or a shorter sequence",
            )
        )


def batch_rows(
    corpus: Corpus,
    *,
    sequence: int,
    global_batch: int,
    vocabulary: int,
    seed: int,
    step: int,
    first: int,
    last: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows [first, last) of one step's batch: tokens, and the token that follows each.

    Both [rows, sequence]. Raises DataError for a token outside the vocabulary.
    """
    per_epoch = (len(corpus.tokens) - 1) // sequence
    numbers = step * global_batch + np.arange(first, last)
    starts = [
        _epoch_order(per_epoch, seed, int(number) // per_epoch)[int(number) % per_epoch] * sequence
        for number in numbers
    ]
    rows = np.stack([corpus.tokens[s : s + sequence + 1] for s in starts]).astype(np.int64)
    if rows.max() >= vocabulary or rows.min() < 0:
        worst = int(rows.max() if rows.max() >= vocabulary else rows.min())
        wanted = f"tokens from 0 to {vocabulary - 1}, the model's vocabulary"
        mend = "tokenise with this model's tokeniser, or train a model with a larger vocabulary"
        raise DataError(Problem(corpus.name, f"step {step}", f"token {worst}", wanted, mend))
    return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(rows)
