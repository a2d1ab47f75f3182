"""The sequence of images is that of the run, whatever the ranks, the workers and the kills."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import DataOrder, Feed

ROOT = Path(__file__).parents[2]
SHAPE = (1, 2, 3)
SEED, BATCH, N, EPOCHS = 11, 8, 64, 3
STEPS = EPOCHS * N // BATCH


@pytest.fixture
def reader(make_shards):
    return ShardReader(make_shards(N, per_shard=9))


def samples_of(batch):
    """Image n of these shards is full of n."""
    return batch.images[:, 0, 0, 0].tolist()


def loaders(reader, world_size, workers=0, start=0):
    return [
        Loader(
            reader,
            SHAPE,
            Feed(BATCH, SEED, world=world_size, rank=rank, start=start, window=3),
            workers=workers,
        )
        for rank in range(world_size)
    ]


def digest(samples):
    return hashlib.sha256(np.array(samples, dtype="<i8").tobytes()).hexdigest()


@pytest.fixture
def expected(reader):
    return DataOrder(reader.counts, SEED, 3).sample_indices(0, EPOCHS * N).tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 1), (4, 3), (8, 0), (8, 1)])
def test_three_epochs_are_the_same_for_all_ranks_and_workers(reader, expected, world_size, workers):
    ranks = []
    for loader in loaders(reader, world_size, workers):
        with loader:
            ranks.append([samples_of(next(loader)) for _ in range(STEPS)])
    joined = [sample for step in zip(*ranks, strict=True) for part in step for sample in part]
    assert digest(joined) == digest(expected)


def test_twenty_kills_and_changes_of_world_size_leave_the_sequence_as_it_was(reader, expected):
    rng = random.Random(3)
    stops = [*sorted(rng.sample(range(1, STEPS), 20)), STEPS]
    seen, done, world_size = [], 0, 1
    for stop in stops:
        world_size = rng.choice([size for size in (1, 2, 4, 8) if size != world_size])
        ranks = loaders(reader, world_size, start=done * BATCH)
        for _ in range(done, stop):
            for rank in ranks:
                seen += samples_of(next(rank))
        for rank in ranks:
            next(rank)  # read and never used: what a kill loses
            rank.close()
        done = stop
    assert digest(seen) == digest(expected)


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**62),
    plan=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9)), max_size=20),
)
def test_the_order_is_pure_whoever_asks_for_which_part(counts, window, seed, plan):
    done, seen = 0, []
    for world_size, steps in plan:
        orders = [DataOrder(counts, seed, window) for _ in range(world_size)]
        part = BATCH // world_size
        for step in range(done, done + steps):
            for rank, order in enumerate(orders):
                seen += order.sample_indices(step * BATCH + rank * part, part).tolist()
        done += steps
    assert seen == DataOrder(counts, seed, window).sample_indices(0, done * BATCH).tolist()


# One process stays, with PyTorch imported, and forks the ranks: a start costs little. Ranks agree
# on every step over gloo before the first of them commits it, as a run does with a checkpoint.
KILLED_RANKS = """
import os, random, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.format.reader import ShardReader

torch.set_num_threads(1)
folder, place, kills, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
log, rng = place / "steps", random.Random(7)
log.touch()

def committed():
    return sum(line.endswith("\\n") for line in log.read_text().splitlines(keepends=True))

def rank_process(rank, world_size, workers, life):
    store = dist.FileStore(str(place / f"store-{life}"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    done = committed()
    dist.barrier()
    feed = Feed(8, 11, done * 8, rank, world_size, window=3)
    loader = Loader(ShardReader(folder), (1, 2, 3), feed, workers=workers)
    for step in range(done, steps):
        mine = next(loader).images[:, 0, 0, 0].long()
        parts = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(parts, mine)
        if rank == 0:
            with log.open("a") as file:
                file.write(" ".join(map(str, torch.cat(parts).tolist())) + "\\n")
        time.sleep(0.002)
    loader.close()
    dist.barrier()

def start(world_size, workers, life):
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            try:
                rank_process(rank, world_size, workers, life)
                os._exit(0)
            except BaseException as error:
                print(rank, repr(error), file=sys.stderr)
                os._exit(1)
        os.setpgid(pid, pid)  # its workers die with it
        pids.append(pid)
    return pids

# What costs a second at the first use is paid once, before the forks.
Loader(ShardReader(folder), (1, 2, 3), Feed(8, 11, window=3)).close()
stops = sorted(rng.sample(range(1, steps - 1), kills)) + [steps]
world_size, killed = 1, 0
for life, stop in enumerate(stops):
    world_size = rng.choice([size for size in (1, 2, 4, 8) if size != world_size])
    workers = rng.choice([0, 0, 0, 1])
    stop = min(max(stop, committed() + 1), steps)
    pids = start(world_size, workers, life)
    limit = time.monotonic() + 300
    while committed() < stop and time.monotonic() < limit:
        time.sleep(0.003)
    if stop < steps:
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    killed += all(code == -signal.SIGKILL for code in codes)
    print(life, world_size, workers, stop, committed(), codes, file=sys.stderr)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if line.endswith("\\n")))
print(killed)
"""


@pytest.mark.long
def test_real_processes_killed_twenty_times_see_the_same_sequence(make_shards, tmp_path):
    folder, num_samples = make_shards(248, per_shard=31), 248
    steps = EPOCHS * num_samples // BATCH
    command = [sys.executable, "-c", KILLED_RANKS, str(folder), str(tmp_path), "20", str(steps)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20, done.stderr
    seen = [int(sample) for sample in (tmp_path / "steps").read_text().split()]
    order = DataOrder(ShardReader(folder).counts, SEED, 3)
    expected = order.sample_indices(0, EPOCHS * num_samples).tolist()
    assert digest(seen) == digest(expected), done.stderr
