"""Models of real shapes with random weights, made in place: no download, no dense copy.

A model is built on the meta device, then each tensor is drawn by a generator seeded with its name.
So two implementations get the same weights, in NF4 the same codes, whatever they wrap them in.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowmem_dpo.linears.nf4 import BLOCK, BLOCK2, Nf4Weight
from lowmem_dpo.weights.bitsandbytes_files import nf4_config, nf4_tensors

_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "tiny": ("llama", (512, 64, 128, 2, 4, 2, 16, False)),
    "layer-dominated": ("llama", (2048, 768, 2688, 4, 12, 4, 64, False)),
    "head-dominated": ("llama", (128256, 512, 1408, 2, 8, 4, 64, False)),
    "qwen2.5-0.5b": ("qwen2", (151936, 896, 4864, 24, 14, 2, 64, True)),
    "200mb": ("llama", (2048, 1024, 4096, 24, 16, 4, 64, True)),
    "1b": ("llama", (8192, 2048, 8192, 16, 32, 8, 64, True)),
    "llama-3.2-1b": ("llama", (128256, 2048, 8192, 16, 32, 8, 64, True)),
    "llama-3.1-8b": ("llama", (128256, 4096, 14336, 32, 32, 8, 128, False)),
    "qwen3-8b": ("qwen3", (151936, 4096, 12288, 36, 32, 8, 128, False)),
}

LOGIT_STD = 3.0  # nats; log-probs spread as much, so that wrong ones show
NF4_RMS = 0.57  # of the 16 levels, all equally likely

MakeLinear = Callable[[str, Nf4Weight | nn.Parameter, nn.Parameter | None], nn.Module]


def shape_config(shape: str) -> PretrainedConfig:
    """The Hugging Face config of a shape."""
    model_type, sizes = SHAPES[shape]
    settings = dict(zip(_FIELDS, sizes, strict=True))
    return AutoConfig.for_model(model_type, max_position_embeddings=8192, **settings)


def random_model(
    shape: str,
    make_linear: MakeLinear,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A frozen model with random weights.

    Args:
        shape: One of `SHAPES`.
        make_linear: Called with path, weight and bias of each linear of the decoder layers; returns
            the module that takes its place.
        quantization: nf4 or none, for the weights of these linears.
        dtype: Of all other tensors.
        device: Where the weights are made.

    Returns:
        The model, in eval mode.
    """
    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def normal(path: str, size: tuple[int, int], std: float) -> nn.Parameter:
        weight = torch.empty(size, dtype=dtype, device=device)
        return frozen(weight.normal_(std=std, generator=_generator(path, device)))

    for path, module in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(module, nn.Linear):
            size = (module.out_features, module.in_features)
            weight: Nf4Weight | nn.Parameter
            if quantization == "nf4":
                weight = random_nf4(path, size, device)
            else:
                weight = normal(path, size, size[1] ** -0.5)
            bias = module.bias
            bias = None if bias is None else frozen(torch.zeros_like(bias, device=device))
            model.set_submodule(path, make_linear(path, weight, bias))
    size, std = (config.vocab_size, config.hidden_size), LOGIT_STD * config.hidden_size**-0.5
    head = normal("lm_head", size, std)
    tied = config.tie_word_embeddings
    model.lm_head.weight = head
    model.model.embed_tokens.weight = head if tied else normal("embed_tokens", size, 1.0)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    for module in model.modules():
        for leaf, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:  # the norms are what is left
                setattr(module, leaf, frozen(torch.ones_like(tensor, device=device)))
    return model.eval()


def random_nf4(name: str, size: tuple[int, int], device: torch.device) -> Nf4Weight:
    """A weight [out, in] of random codes; its numbers are of the order of 1 / sqrt(in)."""
    generator = _generator(name, device)

    def codes(count: int) -> Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8, device=device, generator=generator)

    num_blocks = -(-size[0] * size[1] // BLOCK)
    scale = size[1] ** -0.5 / NF4_RMS
    return Nf4Weight(
        packed=codes(size[0] * size[1] // 2),
        absmax=codes(num_blocks),
        absmax2=torch.full((-(-num_blocks // BLOCK2),), scale / 2, device=device),
        offset=torch.tensor(scale, device=device),
        shape=size,
    )


def write_random_checkpoint(shape: str, folder: Path) -> None:
    """A model of random weights as a folder in bitsandbytes' 4-bit format, a layer at a time."""
    config, cpu = shape_config(shape), torch.device("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(nf4_config(config.to_dict() | {"dtype": "float32"})), encoding="utf-8"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    files: dict[str, str] = {}
    parts = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for part, module in [*parts.items(), ("model.norm", model.model.norm)]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters(prefix=part):
            size = tuple(parameter.shape)
            if len(size) == 2:
                weight = random_nf4(name, (size[0], size[1]), cpu)
                tensors |= nf4_tensors(name, weight, torch.float32)
            else:
                tensors[name] = torch.ones(size)
        save_file(tensors, folder / f"{part}.safetensors")
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
    std = LOGIT_STD * config.hidden_size**-0.5
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not config.tie_word_embeddings)
    for name in names:
        table = torch.empty(config.vocab_size, config.hidden_size)
        table.normal_(std=std, generator=_generator(name, cpu))
        files[name] = f"{name}.safetensors"
        save_file({name: table}, folder / files[name])
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
