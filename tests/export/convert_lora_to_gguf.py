"""The same for adapters: reads what llama.cpp's reads, and writes the LoRA matrices under GGUF's names."""

import argparse
import json
from pathlib import Path

import gguf
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("adapter", type=Path)
parser.add_argument("--base", type=Path, required=True)
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32"], required=True)
args = parser.parse_args()

layers = json.loads((args.base / "config.json").read_text())["num_hidden_layers"]
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
writer = gguf.GGUFWriter(args.outfile, "llama")
writer.add_type(gguf.GGUFType.ADAPTER)
writer.add_float32(
    gguf.Keys.Adapter.LORA_ALPHA, json.loads((args.adapter / "adapter_config.json").read_text())["lora_alpha"]
)
for name, tensor in load_file(args.adapter / "adapter_model.safetensors").items():
    module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
    writer.add_tensor(f"{names.get_name(module)}.weight.lora_{matrix[0].lower()}", tensor.float().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
