"""Loader options, samplers and example batches, before anything starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pipeline.data.loading import Loader, check_data, check_length, check_loader, example_batch
from pipeline.data.randomness import seed_all, seeded
from pipeline.errors import InputError
from pipeline.run.batches import order

DATA = TensorDataset(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_worker": 2}, "loader option 'num_worker' is unknown: did you mean 'num_workers'?"),
        ({"batch_size": 4}, r"loader option 'batch_size' belongs to fit itself: give fit\(..., batch_size=4\)"),
        ({"shuffle": True}, "loader option 'shuffle' belongs to fit itself"),
        ({"num_workers": -1}, "num_workers=-1 must be a whole number, 0 or more"),
        ({"num_workers": "2"}, "num_workers='2' must be a whole number"),
        ({"drop_last": 1}, "drop_last=1 must be True or False"),
        ({"collate_fn": 3}, "collate_fn=3 must be a function"),
        ({"sampler": 3}, "sampler=3 must be a sampler"),
        ({"prefetch_factor": 2}, "the loader options cannot be used: prefetch_factor option could only be specified"),
        ({"persistent_workers": True}, "the loader options cannot be used: persistent_workers option needs"),
        ({"num_workers": 1, "multiprocessing_context": "thread"}, "the loader options cannot be used"),
        ({"batch_sampler": [[0]], "drop_last": True}, "the loader options cannot be used: batch_sampler option is"),
    ],
)
def test_a_loader_option_that_cannot_be_used_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        check_loader(DATA, options, 4)
    assert "\n" not in str(refusal.value)


def test_a_loader_in_place_of_data_is_told_what_to_give() -> None:
    with pytest.raises(InputError, match=r"the data set is a DataLoader: give its data set \(loader.dataset\)"):
        check_data(DataLoader(DATA))


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """Goes on where it was left."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while True:
            self.place += 1
            yield torch.full((1, 2, 2), float(self.place)), 0


class Nameless(SequentialSampler):
    __len__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("dataset", "options", "sentence"),
    [
        (Stream(), {}, "Stream has no length: give max_steps"),
        (DATA, {"sampler": Nameless(DATA)}, "Nameless has no length: give max_steps"),
        (DATA, {"batch_sampler": Nameless(DATA)}, "Nameless has no length: give max_steps"),
        (DATA, {"sampler": WeightedRandomSampler([1.0] * 10, 3)}, "larger than WeightedRandomSampler, which gives 3"),
    ],
)
def test_without_a_length_max_steps_are_asked_for(dataset: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_length(dataset, options, 4, 1, None)
    check_length(dataset, options, 3, 1, 5)


def ordered(options: dict[str, Any], **how: Any) -> list[list[list[Any]]]:
    return order(DATA, options, **{"batch_size": 4, "epochs": 2, "max_steps": None, "shuffle": False, "seed": 3, **how})


def test_a_sampler_decides_the_order_as_in_a_plain_loop() -> None:
    def sampler() -> WeightedRandomSampler:
        return WeightedRandomSampler([1.0, 2.0] * 5, 9, generator=torch.Generator().manual_seed(5))

    for drop_last in (False, True):
        plain = DataLoader(DATA, batch_size=4, sampler=sampler(), drop_last=drop_last)
        expected = [[y.tolist() for _, y in plain] for _ in range(2)]
        assert ordered({"sampler": sampler(), "drop_last": drop_last}) == expected


def test_a_sampler_without_a_generator_follows_the_seed_and_leaves_that_of_the_caller() -> None:
    before = torch.get_rng_state()
    one, same, other = (ordered({"sampler": RandomSampler(DATA)}, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_sampler_decides_all() -> None:
    batches = BatchSampler(SequentialSampler(DATA), 3, drop_last=True)
    assert ordered({"batch_sampler": batches}, epochs=1) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    assert ordered({"batch_sampler": batches}, epochs=5, max_steps=4)[1:] == [[[0, 1, 2]]]


def test_drop_last_leaves_the_smaller_batch_out() -> None:
    assert [len(batch) for batch in ordered({"drop_last": True}, epochs=1)[0]] == [4, 4]


class Endless(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(10)


def test_an_endless_sampler_ends_with_max_steps() -> None:
    assert [[len(batch) for batch in epoch] for epoch in ordered({"sampler": Endless(DATA)}, max_steps=7)] == [[4] * 7]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": [3, 10]}, "list gives sample 10 of a data set that has 10"),
        ({"batch_sampler": [[1], []]}, "list gives a batch without samples"),
        ({"batch_sampler": []}, "list gives no batch"),
        ({"batch_sampler": [1, 2]}, "list cannot say which samples to take"),
    ],
)
def test_a_sampler_of_what_is_not_there_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ordered(options)


class OfSizes(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 2 + index, 2), torch.rand(()).item()), index


def test_the_example_is_joined_as_the_batches_are_and_draws_nothing_of_the_caller() -> None:
    def padded(samples: list[Any]) -> Any:
        return default_collate([(nn_pad(x), y) for x, y in samples])

    def nn_pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 6 - x.shape[1]))

    before = torch.get_rng_state()
    assert example_batch(OfSizes(), collate=padded).shape == (2, 1, 6, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match=r"the first 2 samples of OfSizes cannot be joined to a batch: .*collate_fn"):
        example_batch(OfSizes())


def test_the_example_of_several_inputs_is_a_tuple_or_a_dictionary() -> None:
    x = torch.ones(1, 2, 2)
    by_place, by_name = ([(one, 0)] * 3 for one in ((x, x), {"image": x, "mask": x}))
    found = example_batch(by_place)  # type: ignore[arg-type]
    assert [one.shape for one in found] == [(2, 1, 2, 2)] * 2
    assert isinstance(found, tuple)
    named = example_batch(by_name)  # type: ignore[arg-type]
    assert {name: one.shape for name, one in named.items()} == {"image": (2, 1, 2, 2), "mask": (2, 1, 2, 2)}


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (torch.ones(1), "pairs of an image tensor"),
        ((torch.ones(1), 0, 0), "is list of 3: a data set must give pairs"),
        ((torch.ones(1), 0, "a"), "pairs of an image tensor"),
        (({"image": "a"}, 0), "has dict whose part image is no tensor in place of images"),
        (("a", 0), "in place of images"),
    ],
)
def test_what_is_no_pair_of_images_and_label_is_named(sample: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        example_batch([sample] * 2)  # type: ignore[arg-type]


def test_the_example_of_a_stream_does_not_move_it_on() -> None:
    stream = Stream()
    assert example_batch(stream)[:, 0, 0, 0].tolist() == [1, 2]
    assert stream.place == 0


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}, {"generator": None}])
def test_a_loader_takes_nothing_from_the_default_generator(options: dict[str, Any]) -> None:
    loader = Loader(DATA, options, batch_size=4, seed=0)
    before = torch.get_rng_state()
    for batches in ([[1, 2], [3]], [[4]]):
        assert [y.tolist() for _, y in loader.epoch(batches)] == batches
    assert torch.equal(torch.get_rng_state(), before)


def test_all_three_kinds_of_random_numbers_follow_the_seed() -> None:
    def drawn() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    seed_all(-5)
    first, second = drawn(), drawn()
    seed_all(-5)
    with seeded(1):
        others = drawn()
    assert (drawn(), drawn()) == (first, second)
    with seeded(1):
        assert drawn() == others
