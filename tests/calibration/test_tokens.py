"""Which tokens of a batch count, and which sample each belongs to."""

from __future__ import annotations

import pytest
import torch

from llmreg.calibration.tokens import batch_tokens
from llmreg.errors import RecipeError

CPU = torch.device("cpu")
IDS = torch.arange(8).view(2, 4)


def rows(batch, leading=(2, 4), **settings):
    chosen = batch_tokens(batch, **settings).rows_of(leading, CPU)
    index = list(range(chosen.count)) if chosen.index is None else chosen.index.tolist()
    assert chosen.count == len(index)
    assert chosen.samples == len(set(chosen.sample_of.tolist()))
    return index, chosen.sample_of.tolist()


def test_without_masks_all_tokens_count_and_rows_are_samples() -> None:
    assert rows({"input_ids": IDS}) == (list(range(8)), [0] * 4 + [1] * 4)
    assert rows(IDS) == rows({"input_ids": IDS}) == rows((IDS,))


def test_left_and_right_padding_do_not_count() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert rows({"input_ids": IDS, "attention_mask": mask}) == ([2, 3, 4, 5, 6], [0, 0, 1, 1, 1])


def test_a_row_without_counted_tokens_is_no_sample() -> None:
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    assert rows({"input_ids": IDS, "attention_mask": mask}) == ([4, 5, 6], [0, 0, 0])


def test_labels_count_only_where_asked_for_and_only_if_they_are_per_token() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, 8]])
    batch = {"input_ids": IDS, "labels": labels}
    assert rows(batch, use_label_mask=True) == ([2, 3, 5, 7], [0, 0, 1, 1])
    assert rows(batch)[0] == list(range(8))
    assert rows({"input_ids": IDS, "labels": torch.tensor([0, 1])}, use_label_mask=True)[0] == list(range(8))


def test_documents_of_a_packed_row_are_samples() -> None:
    batch = {"input_ids": torch.arange(7).view(1, 7), "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]])}
    assert rows(batch, (1, 7))[1] == [0, 0, 0, 1, 2, 2, 2]
    assert rows(batch, (7,))[1] == [0, 0, 0, 1, 2, 2, 2]
    labels = torch.tensor([[1, 1, 1, -100, 1, 1, 1]])  # a document without counted tokens is no sample
    assert rows(batch | {"labels": labels}, (1, 7), use_label_mask=True)[1] == [0, 0, 0, 1, 1, 1]


def test_position_ids_of_left_padding_start_no_documents() -> None:
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]),
    }
    assert rows(batch) == ([2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 1])


def test_limit_takes_the_first_counted_tokens_in_row_major_order() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert rows({"input_ids": IDS, "attention_mask": mask}, limit=4) == ([1, 2, 3, 4], [0, 0, 0, 1])


def test_flattened_inputs_are_aligned_and_others_count_whole() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    batch = batch_tokens({"input_ids": IDS, "attention_mask": mask})
    assert batch.aligned((2, 4))
    assert batch.aligned((8,))
    assert batch.aligned((1, 8))
    assert not batch.aligned((5,))
    assert not batch.aligned((4, 2))  # time before batch: another order
    assert batch.rows_of((8,), CPU).index.tolist() == [1, 2, 3, 4, 5, 6]
    assert (batch.rows_of((5,), CPU).count, batch.rows_of((5,), CPU).samples) == (5, 1)
    assert (batch.rows_of((2, 3), CPU).count, batch.rows_of((2, 3), CPU).samples) == (6, 2)
    assert (batch.rows_of((0,), CPU).count, batch.rows_of((0,), CPU).samples) == (0, 0)


def test_feature_batches_have_tokens_in_their_leading_dimensions() -> None:
    assert rows(torch.zeros(5, 20), (5,)) == ([0, 1, 2, 3, 4], [0] * 5)
    assert rows({"inputs_embeds": torch.zeros(2, 4, 20)})[1] == [0] * 4 + [1] * 4


def test_a_batch_that_does_not_tell_its_shape_counts_whole() -> None:
    assert rows({"pixel_values": torch.zeros(2, 3, 8, 8)}, (2, 4))[1] == [0] * 4 + [1] * 4


def test_a_four_dimensional_mask_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"\(2, 1, 4, 4\)"):
        batch_tokens({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)})
