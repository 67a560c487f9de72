"""Writes one linear per preset of compressed-tensors, as that package compresses it, and what it decompresses it to.

    python tests/jaxmodels/quantization/goldens/make_goldens.py

needs torch and compressed-tensors (made with torch 2.13 and compressed-tensors 0.20). compressed_tensors.json has the
`quantization_config` of each preset; compressed_tensors.safetensors has `PRESET.SUFFIX` for its tensors, and
`PRESET.expected`, float32, which no reader sees.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
INPUTS = 256
FORMATS = {
    "W4A16": CompressionFormat.pack_quantized,
    "W4A16_ASYM": CompressionFormat.pack_quantized,
    "W8A8": CompressionFormat.int_quantized,
    "FP8": CompressionFormat.float_quantized,
    "FP8_DYNAMIC": CompressionFormat.float_quantized,
    "FP8_BLOCK": CompressionFormat.float_quantized,
    "NVFP4A16": CompressionFormat.nvfp4_pack_quantized,
    "NVFP4": CompressionFormat.nvfp4_pack_quantized,
}


def ranges(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % 128))
        groups = padded.reshape(-1, 128, INPUTS // 128, 128)
        return groups.amin((1, 3)), groups.amax((1, 3))
    groups = weight.reshape(len(weight), -1, args.group_size or INPUTS)
    return groups.amin(2), groups.amax(2)


tensors, configs = {}, {}
for preset, layout in FORMATS.items():
    torch.manual_seed(0)
    outputs = 136 if preset == "FP8_BLOCK" else 24  # a block more, begun only
    weight = torch.randn(outputs, INPUTS) * torch.rand(outputs, 1) + 0.02
    scheme = preset_name_to_scheme(preset, ["Linear"])
    low, high = ranges(weight, scheme.weights)
    factor = generate_gparam(weight.min(), weight.max()) if scheme.weights.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=factor)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if factor is not None:
        state["weight_global_scale"] = factor.reshape(1)
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        stored["input_scale"] = torch.tensor([0.0125])
    if preset == "NVFP4":
        stored["input_global_scale"] = torch.tensor([123.0])
    for suffix, tensor in stored.items():
        if tensor is not None and (suffix != "weight_zero_point" or preset == "W4A16_ASYM"):
            tensors[f"{preset}.{suffix}"] = tensor.contiguous()
    tensors[f"{preset}.expected"] = expected.float().contiguous()
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    )
    configs[preset] = config.model_dump(mode="json")
save_file(tensors, HERE / "compressed_tensors.safetensors")
(HERE / "compressed_tensors.json").write_text(json.dumps(configs, indent=1) + "\n")
