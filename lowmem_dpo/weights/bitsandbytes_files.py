"""bitsandbytes' 4-bit checkpoints: one weight is a tensor of codes and a few beside it.

    X.weight                                  [out * in / 2, 1]  codes, two a byte
    X.weight.absmax                           [blocks]           scales; uint8 if quantised again
    X.weight.quant_map                        [16] fp32          the levels of NF4
    X.weight.nested_absmax                    [blocks / 256]     fp32 scales of the scales
    X.weight.nested_quant_map                 [256] fp32         what the scales' codes stand for
    X.weight.quant_state.bitsandbytes__nf4    JSON in bytes      shape, block sizes, offset

A weight is quantised if these lie beside it, whatever config.json says; so modules that were left
in 16 bit need no list. Codes and scales are taken as they are, and written as bitsandbytes would.

Source: bitsandbytes, `functional.QuantState.from_dict` and `as_dict`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.linears.nf4 import BLOCK, BLOCK2, Nf4Weight, dynamic_code, nf4_levels
from lowmem_dpo.memory.weight_files import WeightFile
from lowmem_dpo.weights.safetensors_files import StoredTensor

_STATE = ".quant_state.bitsandbytes__"
_LEVELS, _SCALES, _SCALES2, _CODE2 = "quant_map", "absmax", "nested_absmax", "nested_quant_map"


def check_quantization_config(source: str, raw: Mapping[str, Any]) -> None:
    """Refuse, from config.json alone, weights that are quantised in another way than NF4.

    Args:
        source: The model's folder or id, for the message.
        raw: The content of config.json.

    Raises:
        ValueError: Naming what the model is quantised with.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not settings:
        return
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config in config.json of {source} is no object")
    method = settings.get("quant_method") or ("bitsandbytes" if _flags(settings) else "?")
    if method != "bitsandbytes":
        name = method
    elif settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        name = "bitsandbytes in 8 bits (LLM.int8)"
    elif settings.get("bnb_4bit_quant_type", "fp4") != "nf4":  # bitsandbytes' default
        name = f"bitsandbytes as {settings.get('bnb_4bit_quant_type', 'fp4')}"
    else:
        return
    raise ValueError(
        f"{source} is quantised with {name} (quantization_config in config.json); of these only "
        "bitsandbytes nf4 is supported; use the original 16-bit model, it is quantised at load"
    )


def _flags(settings: Mapping[str, Any]) -> bool:
    """Whether settings without a method are those of bitsandbytes, as early ones were."""
    return any(name.lstrip("_").startswith("load_in_") for name in settings)


def check_kept_quantised(source: str, quantization: str) -> None:
    """Refuse `quantization none` for a model that is stored in 4 bits.

    Raises:
        ValueError: If it is asked for.
    """
    if quantization == "none":
        raise ValueError(
            f"{source} is stored in 4 bits, so quantization none cannot give its full precision; "
            "use quantization nf4, which takes it as it is, or the original 16-bit model"
        )


@dataclass(frozen=True)
class StoredNf4:
    """Where a quantised weight lies.

    Attributes:
        name: Of the weight in the model.
        codes: The tensor of codes.
        parts: The tensors beside it, by the last part of their names.
        shape: (out, in).
        offset: Mean of the scales; None where they are not quantised again.
        nbytes: Bytes of its codes.
    """

    name: str
    codes: StoredTensor
    parts: dict[str, StoredTensor]
    shape: tuple[int, int]
    offset: float | None
    nbytes: int

    def read(self, device: torch.device, buffer: Tensor | None = None) -> Nf4Weight:
        """The weight on a device.

        Args:
            device: Where to.
            buffer: As for `StoredTensor.read`, for the codes' way to other devices than the CPU.

        Raises:
            ValueError: If a file is damaged or the levels are not those of NF4.
        """
        levels = self.parts[_LEVELS].read()
        if not torch.allclose(levels, nf4_levels(torch.device("cpu")), rtol=0, atol=1e-5):
            raise _unfit(self.name, self.codes.path, "its levels are not those of NF4")
        codes = self.codes.read(None if device.type == "cpu" else buffer)
        packed = codes.to(device).view(torch.uint8).view(-1)
        absmax = self.parts[_SCALES].read().to(device)
        if self.offset is None:
            return Nf4Weight(packed, absmax, None, None, self.shape)
        code = self.parts[_CODE2].read()
        known = torch.equal(code, dynamic_code(torch.device("cpu")))
        return Nf4Weight(
            packed,
            absmax,
            self.parts[_SCALES2].read().to(device),
            torch.tensor(self.offset, dtype=torch.float32, device=device),
            self.shape,
            None if known else code.to(device),
        )

    def left_on_disk(
        self, device: torch.device, open_file: Callable[[Path], WeightFile]
    ) -> Nf4Weight:
        """The weight with its codes and scales in their files; they are read once, to judge them.

        Args:
            device: Where what files do not hold as it is needed goes: a few bytes.
            open_file: Opens one of them, before it is judged.

        Raises:
            ValueError: As for `read`.
        """
        stored = {"packed": self.codes, "absmax": self.parts[_SCALES]}
        if self.offset is not None:
            stored["absmax2"] = self.parts[_SCALES2]
        files = {name: open_file(tensor.path) for name, tensor in stored.items()}
        weight = self.read(torch.device("cpu"))
        weight.leave_on_disk({name: (files[name], each.offset) for name, each in stored.items()})
        return weight.to(device)


def group_nf4(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | StoredNf4]:
    """Put the tensors of each quantised weight together, under the weight's name.

    Args:
        tensors: Of a checkpoint, quantised or not, by name.

    Returns:
        The same in the same order; what is not quantised as it was.

    Raises:
        ValueError: If a quantised weight lacks a part, contradicts itself, or is not NF4 in blocks
            of 64.
    """
    grouped: dict[str, StoredTensor | StoredNf4] = dict(tensors)
    for key in tensors:
        name, mark, kind = key.partition(_STATE)
        if mark:
            state = _read_state(key, kind, tensors[key])
            names = [_LEVELS, _SCALES] + ([_SCALES2, _CODE2] if "nested_offset" in state else [])
            try:
                codes = tensors[name]
                parts = {part: tensors[f"{name}.{part}"] for part in names}
            except KeyError as error:
                raise _unfit(name, tensors[key].path, f"{error.args[0]} is missing") from None
            grouped[name] = _checked(name, codes, parts, state)
            for part in (key, *(f"{name}.{part}" for part in names)):
                del grouped[part]
    return grouped


def _read_state(key: str, kind: str, stored: StoredTensor) -> dict[str, Any]:
    """The JSON of a quantised weight."""
    if kind != "nf4":
        raise ValueError(
            f"{key} of {stored.path}: only nf4 is trained on; use the original 16-bit model"
        )
    try:
        state = json.loads(bytes(stored.read().tolist()))
        shape, offset = state["shape"], state.get("nested_offset", 0.0)
        fits = len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        if not fits or not math.isfinite(offset):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _unfit(key, stored.path, "it cannot be read") from None
    for what, ours, usual in (("blocksize", BLOCK, None), ("nested_blocksize", BLOCK2, BLOCK2)):
        if state.get(what, usual) != ours:
            raise ValueError(
                f"{key} of {stored.path} has {what} {state.get(what)}; only {ours} is supported: "
                "use the original 16-bit model"
            )
    return state


def _checked(
    name: str, codes: StoredTensor, parts: dict[str, StoredTensor], state: dict[str, Any]
) -> StoredNf4:
    """Hold the sizes of a weight's tensors against its shape."""
    numel = math.prod(state["shape"])
    blocks = -(-numel // BLOCK)
    double = "nested_offset" in state
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        _LEVELS: (torch.float32, (16,)),
        _SCALES: (torch.uint8 if double else torch.float32, (blocks,)),
    }
    if double:
        wanted[_SCALES2] = (torch.float32, (-(-blocks // BLOCK2),))
        wanted[_CODE2] = (torch.float32, (256,))
    fits = all((part.dtype, part.shape) == wanted[key] for key, part in parts.items())
    if not fits or codes.nbytes * 2 != numel:
        raise _unfit(name, codes.path, "its parts do not belong together")
    out_features, in_features = state["shape"]
    offset = state.get("nested_offset")
    return StoredNf4(name, codes, parts, (out_features, in_features), offset, codes.nbytes)


def _unfit(name: str, path: Path, why: str) -> ValueError:
    return ValueError(f"{name} of {path} is damaged ({why}); download or copy it again")


def nf4_tensors(name: str, weight: Nf4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """A double-quantised weight as the tensors of a checkpoint.

    Args:
        name: Of the weight in the model.
        weight: Quantised here.
        dtype: Of the numbers it was made from; other programs dequantise to it.

    Returns:
        Tensors by full name, on any device.
    """
    assert weight.absmax2 is not None and weight.offset is not None and weight.code is None
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": BLOCK2,
        "nested_dtype": "float32",
        "nested_offset": weight.offset.item(),
    }
    text, cpu = bytearray(json.dumps(state).encode()), torch.device("cpu")
    return {
        name: weight.packed.view(-1, 1),
        f"{name}.{_SCALES}": weight.absmax,
        f"{name}.{_LEVELS}": nf4_levels(cpu).clone(),  # no file takes a tensor twice
        f"{name}.{_SCALES2}": weight.absmax2,
        f"{name}.{_CODE2}": dynamic_code(cpu).clone(),
        f"{name}{_STATE}nf4": torch.frombuffer(text, dtype=torch.uint8),
    }


def nf4_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model whose decoder layers were quantised here.

    Args:
        raw: The content of the source's.
    """
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    return {**raw, "quantization_config": settings}
