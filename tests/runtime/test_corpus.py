"""Rows of the corpus: every one once an epoch, the same whatever the plan."""

from __future__ import annotations

import os
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import DataError
from meshwright.runtime.corpus import Corpus, TokenFile, batch_rows, check_corpus, open_corpus


def rows(corpus, step, first, last, *, batch=4, sequence=5, vocabulary=1000):
    return batch_rows(
        corpus,
        sequence=sequence,
        global_batch=batch,
        vocabulary=vocabulary,
        seed=7,
        step=step,
        first=first,
        last=last,
    )


@given(st.integers(0, 20), st.integers(0, 3), st.integers(1, 4))
def test_a_slice_of_the_batch_is_the_same_as_the_batch_sliced(step, first, count):
    corpus = Corpus(name="c", tokens=np.arange(101))
    last = min(first + count, 4)
    whole, part = rows(corpus, step, 0, 4), rows(corpus, step, first, last)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[first:last], b)


def test_an_epoch_visits_every_row_once():
    corpus = Corpus(name="c", tokens=np.arange(101))
    starts = np.concatenate([rows(corpus, step, 0, 4)[0][:, 0] for step in range(5)])
    assert sorted(starts) == list(range(0, 100, 5))


def test_targets_follow_their_tokens():
    tokens, targets = rows(Corpus(name="c", tokens=np.arange(101)), 3, 0, 4)
    assert np.array_equal(tokens + 1, targets)


def test_the_standard_library_is_always_there():
    corpus = open_corpus(None, 256)
    assert len(corpus.tokens) > 1_000_000
    check_corpus(corpus, sequence=1024, global_batch=32)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_read_piece_by_piece(tmp_path, dtype):
    path, array = tmp_path / "tokens.bin", tmp_path / "tokens.npy"
    np.arange(50, dtype=dtype).tofile(path)
    np.save(array, np.arange(50, dtype=dtype))
    for file in (path, array):
        tokens = open_corpus(file, 60_000 if dtype == "uint16" else 100_000).tokens
        assert isinstance(tokens, TokenFile)
        assert len(tokens) == 50
        assert list(tokens[0:50]) == list(range(50))
        assert list(tokens[7:9]) == [7, 8]


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.npy", "text.txt"])
def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path, name):
    path = tmp_path / name
    write(path, np.arange(4096, dtype=np.uint16) if name.endswith("npy") else bytes(8192))
    tokens = open_corpus(path, 256).tokens
    os.truncate(path, 100)
    with pytest.raises(DataError, match=f"{name}.*100 bytes; it was cut short since the run began"):
        tokens[0:4000]


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.bin", "pipe.npy"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, tmp_path, "/dev/zero"):
        with pytest.raises(DataError, match="wanted a regular file"):
            open_corpus(path, 256)


def archive() -> bytes:
    """Several arrays in one file, which numpy opens as well."""
    file = BytesIO()
    np.savez(file, one=np.arange(9), other=np.arange(9))
    return file.getvalue()


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "vocabulary", "words"),
    [
        ("missing.txt", None, 256, "no such file"),
        ("odd.bin", b"abc", 256, "a positive multiple of 2"),
        ("empty.bin", b"", 256, "a positive multiple of 2"),
        ("float.npy", np.zeros(9), 256, "one-dimensional integer array"),
        ("square.npy", np.zeros((3, 3), dtype=np.int64), 256, "one-dimensional integer array"),
        ("garbage.npy", b"not numpy", 256, "a saved numpy array"),
        ("archive.npy", archive(), 256, "a saved numpy array"),
        ("small.txt", b"text", 100, "at least 256"),
    ],
)
def test_unusable_data_is_refused_by_name(tmp_path, name, content, vocabulary, words):
    with pytest.raises(DataError) as caught:
        open_corpus(write(tmp_path / name, content), vocabulary)
    assert name in str(caught.value)
    assert words in str(caught.value)


def test_a_corpus_shorter_than_a_batch_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(DataError, match="9 tokens; wanted at least 129"):
        check_corpus(open_corpus(path, 256), sequence=32, global_batch=4)


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match="tokens from 0 to 9"):
        rows(Corpus(name="c", tokens=np.arange(101)), 0, 0, 4, vocabulary=10)
