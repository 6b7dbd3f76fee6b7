"""Rows of whole documents: none is cut that fits into a row, none is lost, little is filled up."""

import random

import pytest
import torch

from tt_model.cli import make_parser
from tt_model.training import data
from tt_model.training.boilerplate import corpus

FILL = -1


def stream(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents whose token at position p is p."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return torch.arange(int(starts[-1]), dtype=torch.int32), starts


@pytest.mark.parametrize("seed", range(5))
def test_documents_stay_whole(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [8 * rng.randint(1, 12) for _ in range(200)]
    ids, starts = data.whole_documents(*stream(lengths), 64, fill=FILL)
    assert len(ids) % 64 == 0 and int(starts[-1]) == len(ids) and ids.dtype == torch.int32
    assert sorted(ids[ids != FILL].tolist()) == list(range(sum(lengths)))
    assert (starts % 8 == 0).all() and starts.tolist() == sorted(set(starts.tolist()))
    where = {token: place for place, token in enumerate(ids.tolist())}
    begin = 0
    for length in lengths:
        places = [where[token] for token in range(begin, begin + length)]
        for cut in range(0, length, 64):  # a piece of a long one, or all of it: in a row, side by side
            piece = places[cut : cut + 64]
            assert piece == list(range(piece[0], piece[0] + len(piece))) and piece[0] // 64 == piece[-1] // 64
            assert piece[0] in starts
        begin += length
    assert (ids == FILL).float().mean() < 0.06
    again = data.whole_documents(*stream(lengths), 64, fill=FILL)
    assert torch.equal(ids, again[0]) and torch.equal(starts, again[1])


def test_corners() -> None:
    for lengths, expected in (
        ([], []),
        ([4], [0, 1, 2, 3, -1, -1, -1, -1]),
        ([8], [*range(8)]),
        ([12, 4], [*range(8), 8, 9, 10, 11, 12, 13, 14, 15]),
        ([4, 8, 4], [0, 1, 2, 3, 12, 13, 14, 15, *range(4, 12)]),
    ):
        ids, starts = data.whole_documents(*stream(lengths), 8, fill=FILL)
        assert ids.tolist() == expected and int(starts[-1]) == len(expected)


def in_order(source, tokenizer, *, row_length: int, block_size: int) -> int:
    """The rows it takes when each document that does not fit any more begins the next row."""
    lengths = (len(tokenizer.encode(text).ids) + 2 for text in data.load_texts(source, "train"))
    rows, room = 0, 0
    for length in lengths:
        length = -(-length // block_size) * block_size
        if length > room:
            rows, room = rows + 1, row_length
        room = max(room - length, 0)
    return rows


def test_rows_of_the_task_begin_with_headers(tmp_path) -> None:
    corpus.write_corpus(tmp_path, documents=300, share=0)
    tokenizer = data.train_tokenizer(data.load_texts(tmp_path, "train"), 1024)
    size = dict(row_length=512, block_size=16)
    cut, whole = (data.load_rows(tmp_path, tokenizer, **size, whole=whole) for whole in (False, True))
    first = lambda rows: [rows.batch(step, 1, seed=0).ids[0, 0].item() for step in range(len(rows))]
    assert set(first(whole)) == {1} != set(first(cut))
    assert len(cut) <= len(whole)
    assert len(whole) - len(cut) < (in_order(tmp_path, tokenizer, **size) - len(cut)) / 2


def test_option() -> None:
    arguments = ["train", "ar", "--config", "c", "--data", "d", "--out", "o"]
    assert not make_parser().parse_args(arguments).whole_documents
    assert make_parser().parse_args([*arguments, "--whole-documents"]).whole_documents
