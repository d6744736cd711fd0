"""Data as people load them: streams, samplers, loader processes, several inputs, losses with weights, metrics."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler, default_collate

import pipeline
from pipeline.cluster.devices import discover
from tests.engine import largest_difference

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
IMAGES = 14
BATCH = 6


def net(out: int = 4, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(8, out)).double()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 4, (IMAGES,), generator=generator))


def fit(client: Client, model: nn.Module, dataset: Any, strategy: str, **options: Any) -> pipeline.FitResult:
    shares = {"shares": (0.6, 0.4)} if strategy in ("kernel", "batch") else {}
    given = {"batch_size": BATCH, "optimizer": SGD, "shuffle": False, **shares, **options}
    return pipeline.fit(model, dataset, client, members=discover(client)[:2], strategy=strategy, **given)  # type: ignore[arg-type]


def plain(
    model: nn.Module, loader: Any, *, epochs: int = 1, accumulate: int = 1, loss: Any = F.cross_entropy
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a plain loop over a loader after ``torch.manual_seed(0)``."""
    model = copy.deepcopy(model).train()
    update, losses = SGD([*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else [])]), []
    torch.manual_seed(0)
    for _ in range(epochs):
        batches = list(loader)
        for start in range(0, len(batches), accumulate):
            together = batches[start : start + accumulate]
            update.zero_grad()
            for x, y in together:
                one = loss(model(x), y)
                (one / len(together)).backward()
                losses.append(one.item())
            update.step()
    return losses, model.state_dict()


def check(result: pipeline.FitResult, expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    np.testing.assert_allclose(result.history.loss.values, expected[0], rtol=1e-9)
    assert largest_difference(result.model.state_dict(), expected[1]) < 1e-9


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The images one by one; of loader processes each gives its own."""

    def __init__(self, sized: bool = False) -> None:
        self.data, self.sized = data(), sized

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.data[place] for place in range(first, IMAGES, step))

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("no length")
        return IMAGES


@pytest.mark.parametrize("strategy", ["kernel", "ddp"])
@pytest.mark.parametrize(
    ("options", "accumulate"), [({}, 1), ({}, 2), ({"drop_last": True}, 1), ({"num_workers": 2}, 1)], ids=str
)
def test_a_stream_trains_as_in_a_plain_loop(
    client: Client, strategy: str, options: dict[str, Any], accumulate: int
) -> None:
    expected = plain(net(), DataLoader(Stream(), BATCH, **options), epochs=2, accumulate=accumulate)
    result = fit(
        client, net(), Stream(sized=True), strategy, epochs=2, accumulate=accumulate, loader=options,
        validation=Stream(),
    )  # fmt: skip
    check(result, expected)
    x, y = data().tensors
    right = (result.model.eval()(x).argmax(1) == y).double().mean().item()
    assert result.history.accuracy.values[-1] == pytest.approx(right)


@pytest.mark.parametrize("strategy", ["kernel", "ddp"])
def test_a_stream_ends_with_max_steps_within_an_epoch(client: Client, strategy: str) -> None:
    losses, _ = plain(net(), DataLoader(Stream(), BATCH), epochs=2)
    found = fit(client, net(), Stream(), strategy, epochs=5, max_steps=5).history.loss
    np.testing.assert_allclose(found.values, losses[:5], rtol=1e-9)


def test_a_stream_without_samples_is_named(client: Client) -> None:
    class Once(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.given = 0

        def __iter__(self) -> Iterator[Any]:
            self.given += 1
            return super().__iter__() if self.given == 1 else iter([])

    losses, _ = plain(net(), DataLoader(Once(), BATCH))
    found = fit(client, net(), Once(), "kernel", epochs=3, max_steps=50).history.loss
    np.testing.assert_allclose(found.values, losses, rtol=1e-9)


@pytest.mark.parametrize("strategy", ["kernel", "ddp"])
def test_a_sampler_and_processes_that_stay_are_those_of_a_plain_loop(client: Client, strategy: str) -> None:
    def sampler() -> WeightedRandomSampler:
        return WeightedRandomSampler([1.0, 3.0] * 7, 13, generator=torch.Generator().manual_seed(4))

    expected = plain(net(), DataLoader(data(), BATCH, sampler=sampler(), drop_last=True), epochs=2)
    options = {"sampler": sampler(), "drop_last": True, "num_workers": 1, "persistent_workers": True}
    check(fit(client, net(), data(), strategy, epochs=2, loader=options), expected)


def test_a_batch_sampler_decides_the_size_of_every_batch(client: Client) -> None:
    batches = [[3, 1, 2], [5], [9, 8, 7, 6, 0]]
    result = fit(client, net(), data(), "batch", loader={"batch_sampler": batches})
    check(result, plain(net(), DataLoader(data(), batch_sampler=batches)))
    assert result.plan.batch_size == 5


def _without_the_odd(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if int(sample[1]) % 2 == 0] or samples[:1])


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
def test_a_collate_function_may_leave_samples_out(client: Client, strategy: str) -> None:
    options = {"collate_fn": _without_the_odd}
    check(fit(client, net(), data(), strategy, loader=options), plain(net(), DataLoader(data(), BATCH, **options)))


def test_ddp_counts_what_a_collate_function_leaves(client: Client) -> None:
    result = fit(client, net(), data(), "ddp", loader={"collate_fn": _without_the_odd})
    parts = [_without_the_odd([data()[place] for place in part]) for part in ([0, 1, 2], [3, 4, 5])]
    losses = [F.cross_entropy(net()(x), y, reduction="sum").item() for x, y in parts]
    expected = sum(losses) / sum(len(y) for _, y in parts)
    assert float(result.history.loss[0]) == pytest.approx(expected, rel=1e-9)


class Growing(Dataset[Any]):
    """Images of the same size in each batch, but not in all."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.full((3, 8 + 2 * (index // BATCH), 8), float(index), dtype=torch.float64), index % 4


def test_images_of_changing_size_are_refused_where_shapes_are_planned(client: Client) -> None:
    for strategy in ("kernel", "single"):
        with pytest.raises(
            pipeline.RunError, match=r"images of 3x10x8 after others of 3x8x8: .*strategy='ddp'"
        ) as told:
            fit(client, net(), Growing(), strategy)
        assert "\n" not in str(told.value)
    check(fit(client, net(), Growing(), "ddp"), plain(net(), DataLoader(Growing(), BATCH)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.place = net(), nn.Embedding(3, 4, dtype=torch.float64)

    def forward(self, image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.net(image) + self.place(place)
        return output


class Placed(Dataset[Any]):
    def __init__(self, by_name: bool) -> None:
        self.data, self.by_name = data(), by_name

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return ({"place": index % 3, "image": x} if self.by_name else (x, index % 3)), y


@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs_are_passed_on_under_ddp(client: Client, by_name: bool) -> None:
    model = TwoInputs()
    x, y = data().tensors
    place = torch.arange(IMAGES) % 3
    losses = []
    reference = copy.deepcopy(model)
    update = SGD(reference.parameters())
    for start in range(0, IMAGES, BATCH):
        some = slice(start, start + BATCH)
        one = F.cross_entropy(reference(x[some], place[some]), y[some])
        update.zero_grad()
        one.backward()
        update.step()
        losses.append(one.item())
    dataset = Placed(by_name)
    check(fit(client, model, dataset, "ddp", validation=dataset), (losses, reference.state_dict()))


class Proxies(nn.Module):
    """Cosine to one trainable proxy a class, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4).cos())
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        return F.cross_entropy(F.normalize(output) @ F.normalize(self.proxies).T, target)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["kernel", "batch", "ddp"])
def test_weights_of_the_loss_are_trained_with_those_of_the_model(
    client: Client, strategy: str, accumulate: int
) -> None:
    reference, given = Proxies(), Proxies()
    expected = plain(net(), DataLoader(data(), BATCH), epochs=2, loss=reference, accumulate=accumulate)
    for groups in (None, lambda m: [{"params": list(m.parameters())}, {"params": list(given.parameters())}]):
        result = fit(
            client, net(), data(), strategy, loss=given, epochs=2, parameter_groups=groups, accumulate=accumulate
        )
        check(result, expected)
        assert isinstance(result.loss, Proxies)
        torch.testing.assert_close(result.loss.proxies, reference.proxies)
        assert result.loss.batches == 6
        assert given.batches == 0


def test_weights_of_the_loss_are_trained_by_a_master_without_weights_of_the_model(client: Client) -> None:
    reference = Proxies()
    expected = plain(net(), DataLoader(data(), BATCH), loss=reference)
    model = nn.Sequential(*list(net())[:3], nn.Flatten(), nn.Linear(8, 4)).double()  # type: ignore[call-overload]
    model.load_state_dict({name.replace("5.", "4."): tensor for name, tensor in net().state_dict().items()})
    result = fit(client, model, data(), "batch", loss=Proxies(), shares=(0.0, 1.0))
    np.testing.assert_allclose(result.history.loss.values, expected[0], rtol=1e-9)
    torch.testing.assert_close(result.loss.proxies, reference.proxies)  # type: ignore[union-attr]


def _second_best(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (output.topk(2).indices == target[:, None]).any(1).sum(), len(target)


class _Heard:
    def __init__(self) -> None:
        self.epochs: list[Any] = []

    def on_epoch(self, epoch: Any) -> None:
        self.epochs.append(epoch)


@pytest.mark.parametrize("strategy", ["kernel", "ddp"])
def test_metrics_are_told_by_epoch_and_a_schedule_follows_the_monitored_one(client: Client, strategy: str) -> None:
    x, y = data().tensors
    metrics = {"top2": _second_best, "margin": lambda output, _: output.max(1).values.mean()}
    result = fit(
        client, net(), data(), strategy, epochs=4, validation=data(), metrics=metrics, monitor="top2",
        scheduler=functools.partial(ReduceLROnPlateau, mode="max", patience=0, factor=0.1), callbacks=[_Heard()],
    )  # fmt: skip
    model = net()
    update = SGD(model.parameters())
    schedule, losses, told = ReduceLROnPlateau(update, mode="max", patience=0, factor=0.1), [], []
    for _ in range(4):
        for some_x, some_y in DataLoader(data(), BATCH):
            one = F.cross_entropy(model.train()(some_x), some_y)
            update.zero_grad()
            one.backward()
            update.step()
            losses.append(one.item())
        told.append((_second_best(model.eval()(x), y)[0] / IMAGES).item())
        schedule.step(told[-1])
    check(result, (losses, model.state_dict()))
    assert update.param_groups[0]["lr"] < 0.05
    np.testing.assert_allclose(result.history.top2.values, told)
    assert "accuracy" not in result.history
    (heard,) = result.callbacks
    assert [one.metrics["top2"] for one in heard.epochs] == pytest.approx(told)  # type: ignore[attr-defined]
    assert heard.epochs[0].accuracy is None  # type: ignore[attr-defined]
    assert heard.epochs[-1].metrics["margin"] == pytest.approx(model(x).max(1).values.mean().item())  # type: ignore[attr-defined]


class Noisy(Dataset[Any]):
    """Draws from all three random generators, in the process that loads."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        import random

        x, y = data()[index]
        return x + random.random() + np.random.rand() + torch.rand(()).item(), y  # noqa: NPY002


def test_random_numbers_of_the_data_are_those_of_a_plain_loop(client: Client) -> None:
    from pipeline.data.randomness import seed_all

    model = net()
    update, losses = SGD(model.parameters()), []
    seed_all(0)
    for x, y in DataLoader(Noisy(), BATCH, generator=torch.Generator()):
        one = F.cross_entropy(model(x), y)
        update.zero_grad()
        one.backward()
        update.step()
        losses.append(one.item())
    check(fit(client, net(), Noisy(), "kernel"), (losses, model.state_dict()))


def test_a_schedule_that_follows_an_accuracy_of_values_is_told_so(client: Client) -> None:
    x, _ = data().tensors
    values = TensorDataset(x, torch.full((IMAGES, 1), 3.0, dtype=torch.float64))
    with pytest.raises(pipeline.RunError, match="monitor 'accuracy' cannot be told of these outputs and labels"):
        fit(client, net(1), values, "kernel", loss=nn.MSELoss(), validation=values, monitor="accuracy")
    assert "accuracy" not in fit(client, net(1), values, "kernel", loss=nn.MSELoss(), validation=values).history


def test_what_was_timed_can_be_written_as_netcdf(client: Client, tmp_path: Path) -> None:
    result = fit(client, net(), data(), "kernel", validation=data())
    result.timing.to_netcdf(tmp_path / "timing.nc", engine="scipy")
    result.history.to_netcdf(tmp_path / "history.nc", engine="scipy")
    assert (tmp_path / "timing.nc").stat().st_size > 0


def test_bad_data_are_refused_before_anything_starts(client: Client) -> None:
    for options, sentence in (
        ({"dataset": DataLoader(data())}, "the data set is a DataLoader"),
        ({"validation": DataLoader(data())}, "validation is a DataLoader"),
        ({"dataset": Stream()}, "Stream has no length: give max_steps"),
        ({"loader": {"num_worker": 1}}, "did you mean 'num_workers'"),
        ({"loss": nn.CrossEntropyLoss}, "the loss is the class CrossEntropyLoss"),
        ({"monitor": "iou", "validation": data()}, "monitor 'iou' is no metric"),
        (
            {"scheduler": functools.partial(ReduceLROnPlateau, mode="max"), "validation": data()},
            "would follow the training loss",
        ),
    ):
        given: dict[str, Any] = {"dataset": data(), **options}
        with pytest.raises(pipeline.InputError, match=sentence) as refusal:
            fit(client, net(), given.pop("dataset"), "kernel", **given)
        assert "\n" not in str(refusal.value)


def test_workers_that_may_not_start_processes_are_named(foreign_cluster: Any) -> None:
    scheduler = foreign_cluster(["--resources", "CPU=1", "--name", "elsewhere"])
    with (
        pipeline.connect(scheduler) as client,
        pytest.raises(pipeline.InputError, match="num_workers=1 needs processes that worker elsewhere may not start"),
    ):
        pipeline.fit(net(), data(), client, members=wait(client), batch_size=BATCH, loader={"num_workers": 1})


def wait(client: Client) -> Any:
    from pipeline.cluster.devices import wait_for_members

    return wait_for_members(client, 1)
