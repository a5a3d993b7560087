"""Which device and which number format a run computes in."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Turn the setting `device` into a torch device.

    Args:
        name: auto (the CUDA card where there is one, else the CPU), cpu, cuda or cuda:N.

    Raises:
        ValueError: If the name is unknown or the card is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device {name} was asked for, but torch {torch.__version__} sees no CUDA card; "
                "install a CUDA build of torch or use --device cpu"
            )
        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {name} was asked for; there are {torch.cuda.device_count()} cards"
            )
        return torch.device("cuda", int(index or 0))
    return torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the setting `dtype` into a torch dtype that suits the device.

    Args:
        name: auto, bfloat16, float16 or float32.
        device: Where the run computes.

    Raises:
        ValueError: If the device cannot compute in it.
    """
    if device.type == "cpu":
        if name == "float16":
            raise ValueError(
                "dtype float16 needs loss scaling on a CUDA card; on the CPU use float32"
            )
        return DTYPES["float32" if name == "auto" else name]
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name == "bfloat16" and not has_bfloat16:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16; use dtype float16 or auto"
        )
    return DTYPES[name]
