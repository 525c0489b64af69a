"""Which device and which precision a script computes with."""

import os

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def find_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best there is. Raises ValueError for one that is not there."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's own ways to say that there is none
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):  # "meta" computes nothing, without a word
        raise ValueError(f"--device {name}: this machine or this build of torch has no such device")
    return device


def has_bf16_products(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for bf16 products. With AVX512-BF16 they take less than half of fp32's time
    (docs/speed.md); AMX was not measured."""
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def find_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Precision of the matrix products: the one asked for, or fp16 on CUDA, else fp32. Raises ValueError for fp16 on a CPU."""
    dtype = DTYPES[name or ("fp16" if device.type == "cuda" else "fp32")]
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("--dtype fp16 needs a GPU: on a CPU train in fp32 (the default)")
    return dtype


def to_device(value, device: torch.device):
    """A batch, with every tensor in its dicts, lists and tuples, on the device."""
    if isinstance(value, dict):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(each, device) for each in value]
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value
