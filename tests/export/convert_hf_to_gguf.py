"""A converter for tiny Llamas with the command line of llama.cpp's, so that export is tested where that is not at hand.

It writes what transformers reads back: weights by GGUF's names, the rotary halves of queries and keys interleaved.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32", "f16"], required=True)
parser.add_argument("--model-name")
args = parser.parse_args()

config = json.loads((args.model / "config.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(args.model)
heads, kv_heads, layers = (config[f"num_{k}"] for k in ("attention_heads", "key_value_heads", "hidden_layers"))
writer = gguf.GGUFWriter(args.outfile, "llama")
writer.add_name(args.model_name)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(layers)
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("gpt2")
writer.add_token_list([tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))])
writer.add_token_merges(["a b"])
writer.add_eos_token_id(tokenizer.eos_token_id)
writer.add_add_bos_token(False)
writer.add_chat_template(tokenizer.chat_template)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
for name, tensor in load_file(args.model / "model.safetensors").items():
    data = tensor.float().numpy()
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        n = heads if "q_proj" in name else kv_heads
        data = data.reshape(n, 2, data.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(data.shape)
    kind = np.float32 if args.outtype == "f32" or data.ndim == 1 else np.float16
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(data.astype(kind)))
print("Writing:  50%|")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
