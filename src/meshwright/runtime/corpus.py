"""Reads training data: text files, token files, and a corpus that is always there.

The token stream is cut into consecutive rows of `sequence` tokens, which every epoch visits in a
new random order. The order depends on the seed alone, never on the plan.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import DataError, Problem
from meshwright.files import check_input
from meshwright.records import record

BYTE_VOCABULARY = 256
STANDARD_LIBRARY = "python-standard-library"
"""Name of the corpus that is always there: the source of Python's standard library."""


class TokenSequence(Protocol):
    """Declares a sequence of token ids that is read in slices."""

    def __len__(self) -> int:
        """Returns the number of tokens."""

    def __getitem__(self, part: slice, /) -> NDArray[np.integer]:
        """Returns the tokens from `part.start` to `part.stop`."""


@record
class Corpus:
    """Names the tokens on which a model is trained."""

    name: str
    tokens: TokenSequence


class TokenFile:
    """Reads tokens from a file on disk, at each access.

    The file is not mapped into memory: if it were cut short during a run, reading it would kill the
    process with SIGBUS and no error message.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.integer], offset: int, count: int) -> None:
        self._path, self._dtype, self._offset, self._count = path, dtype, offset, count
        self._file = _open(path)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> NDArray[np.integer]:
        """Returns the tokens from `part.start` to `part.stop`. Raises DataError if the file has
        been cut short, or cannot be read any more."""
        start, stop, _ = part.indices(self._count)
        wanted = max(0, stop - start) * self._dtype.itemsize
        place = self._offset + start * self._dtype.itemsize
        try:
            text = os.pread(self._file, wanted, place)
        except OSError as failure:
            raise _unreadable(self._path, failure) from None
        if len(text) < wanted:
            found = f"{os.fstat(self._file).st_size} bytes; it was cut short since the run began"
            needed = f"{self._offset + self._count * self._dtype.itemsize} bytes"
            raise DataError(Problem(str(self._path), "", found, needed))
        return np.frombuffer(text, dtype=self._dtype)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _open(path: Path) -> int:
    """Opens a regular file and returns its descriptor. Raises DataError."""
    try:
        # Without O_NONBLOCK, opening a pipe that has no writer would block.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(Problem(str(path), "", "no such file", "a text or token file")) from None
    except (OSError, ValueError) as failure:
        raise _unreadable(path, failure) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise DataError(Problem(str(path), "", "no regular file", "a text or token file"))
    return file


def _unreadable(path: Path, failure: Exception) -> DataError:
    found = getattr(failure, "strerror", None) or str(failure)
    return DataError(Problem(str(path), "", found, "a readable file"))


def open_corpus(source: str | Path | None, vocabulary: int) -> Corpus:
    """Opens the corpus that `source` names.

    `None`: the source code of Python's standard library. `*.bin`: raw token ids (uint16, or uint32
    for vocabularies beyond 65,536). `*.npy`: a one-dimensional integer array. Anything else: a text
    file, one token per byte. Raises DataError.
    """
    if vocabulary < BYTE_VOCABULARY and (source is None or _is_text(Path(source))):
        wanted = f"a vocabulary of at least {BYTE_VOCABULARY}: text is read byte by byte"
        raise DataError(Problem(str(source or STANDARD_LIBRARY), "", f"{vocabulary}", wanted))
    if source is None or source == STANDARD_LIBRARY:
        return Corpus(name=STANDARD_LIBRARY, tokens=_standard_library())
    path = Path(source)
    check_input(path, error=DataError)
    if path.suffix == ".bin":
        tokens = _raw(path, np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32))
    elif path.suffix == ".npy":
        tokens = _array(path)
    else:
        tokens = TokenFile(path, np.dtype(np.uint8), 0, path.stat().st_size)
    return Corpus(name=str(path), tokens=tokens)


def _is_text(path: Path) -> bool:
    return path.suffix not in (".bin", ".npy")


def _raw(path: Path, dtype: np.dtype[np.unsignedinteger]) -> TokenFile:
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        wanted = f"a positive multiple of {dtype.itemsize}: {dtype.name} tokens"
        raise DataError(Problem(str(path), "", f"{size} bytes", wanted))
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _array(path: Path) -> TokenFile:
    """Opens a numpy array as a TokenFile; reads only its header."""
    wanted = "a saved numpy array"
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError) as failure:
        raise DataError(Problem(str(path), "", str(failure), wanted)) from None
    except OSError as failure:
        raise _unreadable(path, failure) from None
    if not isinstance(tokens, np.memmap):  # an archive of several
        raise DataError(Problem(str(path), "", type(tokens).__name__, wanted))
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} array of shape {tokens.shape}"
        raise DataError(Problem(str(path), "", found, "a one-dimensional integer array"))
    return TokenFile(path, tokens.dtype, tokens.offset, len(tokens))


@lru_cache
def _standard_library() -> NDArray[np.uint8]:
    """Returns the source of every module of the standard library on this machine, in order of
    path."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    return np.frombuffer(b"".join(p.read_bytes() for p in modules), dtype=np.uint8)


def check_corpus(corpus: Corpus, *, sequence: int, global_batch: int) -> None:
    """Raises DataError if the corpus holds less than one batch."""
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
    """Returns rows [first, last) of one step's batch: input tokens, and the token that follows
    each.

    Both arrays are [rows, sequence]. Raises DataError for a token outside the vocabulary.
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
