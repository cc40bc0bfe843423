"""Run a function in two gloo processes: ``two_ranks(fn, *args)`` returns what each rank's ``fn(rank, *args)`` returned."""

import os
import socket
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank, fn, port, folder, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def two_ranks(fn, *args):
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        mp.start_processes(_worker, (fn, port, folder, args), nprocs=2, start_method="fork")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
