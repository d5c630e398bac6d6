"""Processes that share one evaluation, as `torchrun` and `accelerate launch` start them."""

import os
from typing import Any

import torch
import torch.distributed as dist


def join_processes() -> tuple[int, int]:
    """Join the group of processes that the environment describes; returns the rank and the number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # only small objects are exchanged
    return dist.get_rank(), dist.get_world_size()


def device_of_process(device: torch.device, num_processes: int) -> torch.device:
    """Return the GPU of this process if there are several processes, else the given device."""
    if device.type != "cuda" or num_processes == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def gather(value: Any, num_processes: int) -> list[Any]:
    """Gather a value from all processes, in the order of their ranks."""
    if num_processes == 1:
        return [value]
    values = [None] * num_processes
    dist.all_gather_object(values, value)
    return values
