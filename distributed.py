"""Processes of torchrun that train one model together: each with all of it, or with a shard."""
import atexit
import os
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import die
from machine import choose_device


def join_processes(device):
    """
    (which process this is, of how many, its device). Under torchrun these are those that train
    together, by NCCL on a GPU each or by gloo on CPUs; else 0, 1 and `device` as it is.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch.cuda.set_device(choose_device(device))
        except ValueError as e:
            die(f"{e}: --nproc_per_node is at most the number of GPUs")
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the first one may prepare data
    atexit.register(leave)
    return dist.get_rank(), dist.get_world_size(), device


def leave():
    """Part from the others, in an order that gloo needs: see PyTorch's issue 190489."""
    dist.destroy_process_group()
    time.sleep(0.2)  # its threads drop their last tensors, and would abort where Python has ended


def wait_for_all():
    """Go on when all processes that train together are here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(numbers):
    """A tensor's sum over all processes that train together, in its place."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def spread(model, regularizer, device, compiled, sharded):
    """
    Put a GPT on the CPU, and a regularizer (None: none), on the device, whole or sharded. Returns
    what training calls in place of the two, so that gradients are means over the processes.
    """
    if sharded:
        shard(model, regularizer, device)
    else:
        for part in filter(None, (model, regularizer)):
            part.to(device)
    forward = torch.compile(model) if compiled else model
    if sharded or not dist.is_initialized():
        return forward, regularizer
    return DistributedDataParallel(forward), regularizer and DistributedDataParallel(regularizer)


def share_gradients(parts, now):
    """Have whole copies take their means of gradients in the next backward pass, or not yet."""
    for part in parts:
        if isinstance(part, DistributedDataParallel):
            part.require_backward_grad_sync = now


# ------------------------------------------------------------------------------------------ FSDP
def shard(model, regularizer, device):
    """
    Leave to each process, on its device, a shard of every parameter of a GPT on the CPU, and of a
    regularizer (None: none): FSDP gathers a block's while it is computed. It takes no scalars,
    which stay whole, and whose gradients are averaged here.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes half a second
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing here is changed in place
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    scalars = {p for p in model.parameters() if p.dim() == 0}
    for p in scalars:
        p.data = p.data.to(device)
        p.register_hook(lambda gradient: add_up(gradient / dist.get_world_size()))
    for part in filter(None, (*model.blocks, model, regularizer)):
        fully_shard(part, mesh=mesh, ignored_params=scalars)


def is_shard(tensor):
    return hasattr(tensor, "full_tensor")  # torch.distributed.tensor's, without its slow import


def shard_as(tensor, ours):
    """This process's part of a whole tensor, if `ours`, of the same shape, is a shard."""
    if not is_shard(ours) or tensor.shape != ours.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, ours.device_mesh, ours.placements, src_data_rank=None)


def load(module, whole, strict=True):
    """module.load_state_dict() of whole tensors, where the module's may be shards."""
    ours = module.state_dict()
    parts = {name: shard_as(tensor, ours.get(name)) for name, tensor in whole.items()}
    module.load_state_dict(parts, strict=strict)


def gathered(state):
    """
    A state dict with each shard as a whole tensor, on the CPU of the first process, None in the
    others. All must call it.
    """
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if not is_shard(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def clip(parameters, most):
    """clip_grad_norm_() of torch, whose norm is a plain tensor also where gradients are shards."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if is_shard(norm) else norm
