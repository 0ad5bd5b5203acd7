import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from wsi_pipeline.training.ranks import Ranks, join_ranks


class Net(nn.Module):
    """A shared layer and two heads, as networks have them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.heads = nn.ModuleDict(
            {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2), "c": nn.Linear(4, 2)}
        )
        self.heads["norm"], self.heads["idle"] = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x, name):
        return self.heads[name](self.encoder(x))


def build():
    torch.manual_seed(0)
    return Net()


def data():
    torch.manual_seed(1)
    return torch.randn(6, 3), ["a", "a", "b", "a", "b", "a"]


def loss_of(net, rows, counts):
    x, names = data()
    return sum(net(x[i : i + 1], names[i]).square().sum() / counts[names[i]] for i in rows)


def work(rank, world, port, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    ranks = Ranks(rank=rank, world=world, device="cpu")
    net = build()
    rows = range(6)[rank::world]
    own = {}
    for i in rows:
        own[data()[1][i]] = own.get(data()[1][i], 0) + 1
    counts = ranks.total(own, ["a", "b", "c"])
    loss_of(net, rows, counts).backward()
    ranks.add_gradients(net)
    with torch.no_grad():
        net.norm.running_mean.fill_(float(rank))
        net.heads["norm"].running_mean.fill_(7.0 if rank else 1.0)
        net.heads["idle"].running_mean.fill_(3.0)
    # the first rank has seen three samples, none of them for the head "norm"
    ranks.share_statistics(net, {"norm": 2} if rank else {}, 1 if rank else 3)
    torch.save(
        {
            "counts": counts,
            "grads": {k: p.grad for k, p in net.named_parameters()},
            "mean": net.norm.running_mean.clone(),
            "head": net.heads["norm"].running_mean.clone(),
            "idle": net.heads["idle"].running_mean.clone(),
            "agreed": ranks.agree(float(rank) + 5, 2.0),
            "any": (ranks.any(rank == 1), ranks.any(False)),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_sum_of_the_ranks_gradients_is_the_gradient_of_the_batch(tmp_path):
    mp.spawn(work, args=(2, free_port(), str(tmp_path)), nprocs=2)
    alone = build()
    loss_of(alone, range(6), {"a": 4, "b": 2}).backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["counts"] == {"a": 4, "b": 2}
        for name, parameter in alone.named_parameters():
            if name.startswith(("heads.c.", "unused.")):
                assert found["grads"][name] is None  # nobody has labels for it: it stays
            elif "norm" not in name and "idle" not in name:
                assert torch.allclose(found["grads"][name], parameter.grad, atol=1e-6), name
        assert (found["mean"] == 0.25).all()
        assert (found["head"] == 7.0).all()
        assert (found["idle"] == 3.0).all()
        assert found["agreed"] == (5.0, 2.0)
        assert found["any"] == (True, False)


def join_and_leave(rank, port, folder):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    with join_ranks("cpu") as ranks:
        weight = nn.Parameter(torch.ones(3))
        weight.sum().backward()
        torch.optim.AdamW([weight]).step()
        ranks.any(False)
        during = threads()
    (folder / str(rank)).write_text(f"{during}\n{threads()}")


def threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    # One that does may abort the process at its end.
    mp.spawn(join_and_leave, args=(free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        during, after = map(int, (tmp_path / str(rank)).read_text().split())
        assert during > 0
        assert after == 0


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert ranks.total({"a": 2}, ["a", "b"]) == {"a": 2}
        assert ranks.agree(1.5) == (1.5,)
        assert ranks.any(True) is True
        net = build()
        ranks.add_gradients(net)
        ranks.share_statistics(net, {}, 6)
        assert all(p.grad is None for p in net.parameters())
    assert not dist.is_initialized()
    assert os.environ.get("WORLD_SIZE") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_rank_takes_its_own_card(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with join_ranks("cuda") as ranks:
        assert ranks.device == "cuda"
