"""One block on a map of 2048 x 2048 tokens (4.2 million), its rows shared out to several processes.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Each process prints the most memory it had. In training, gradients of the parameters are each process's part:
their sum over the group is the gradient (DistributedDataParallel averages: multiply the loss by the number of
processes).
"""

import argparse
import resource
import sys
import time

import torch
import torch.distributed as dist

from flatten_ext import FocusedLinearAttention


def main(side: int, channels: int) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    ends = [side * i // count for i in range(count + 1)]
    rows = ends[rank + 1] - ends[rank]
    torch.manual_seed(0)  # the same parameters on every process
    block = FocusedLinearAttention(channels, 2, process_group=dist.group.WORLD, dtype=torch.bfloat16)
    with torch.inference_mode():
        x = torch.rand(1, rows * side, channels, dtype=torch.bfloat16)  # this process's strip
        start = time.perf_counter()
        out = block(x, size=(rows, side))
    took = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print(f"process {rank}: {rows} of {side} rows, {tuple(out.shape)} in {took:.1f} s, peak {peak:.2f} GB")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=2048, help="tokens a side of the map")
    parser.add_argument("--channels", type=int, default=64)
    options = parser.parse_args()
    main(options.side, options.channels)
