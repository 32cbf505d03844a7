"""Reference logits for `cargo test -p plumbline-engine --test gpu`, by Hugging Face transformers on the same GPU.

    python3 engine/tests/transformers_reference.py OUT [MODELS_FOLDER]
    PLUMBLINE_REFERENCE=OUT cargo test -p plumbline-engine --test gpu -- --nocapture

Each case is a folder with a model of random weights as `save_pretrained` writes it, and `reference.safetensors`: for each
prompt its tokens and the 64 that follow greedily (`tokens_<i>`), and the logits at the 64 places by the eager and the
SDPA path in bf16 and by the SDPA path in fp32 (`eager_<i>`, `sdpa_<i>`, `fp32_<i>`).
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

NEW_TOKENS = 64
PROMPTS = [1, 7, 16, 33, 130, 517]
HERE = os.path.dirname(os.path.abspath(__file__))


def configs(models):
    def read(name):
        with open(os.path.join(models, f"{name}.json")) as file:
            return json.load(file)

    small = dict(read("qwen3-0.6b"), hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=64, intermediate_size=512, vocab_size=2048)
    yield "qwen3-small", small
    yield "qwen3-0.6b", read("qwen3-0.6b")
    yield "llama3-8b-4-layers", dict(read("llama3-8b"), num_hidden_layers=4)


@torch.no_grad()
def write(folder, keys):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "config.json")
    with open(path, "w") as file:
        json.dump(keys, file)
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(7)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    # Norms that are all ones would hide which weight is used where.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    # Several shards, as large models have.
    model.save_pretrained(folder, max_shard_size="300MB")
    model.eval()
    tensors = {}
    generator = torch.Generator().manual_seed(11)
    sequences = []
    for i, length in enumerate(PROMPTS):
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator).cuda()
        cache = None
        step = tokens
        for _ in range(NEW_TOKENS):
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], 1)
        sequences.append(tokens)
        tensors[f"tokens_{i}"] = tokens[0].cpu()

    def logits(name, model):
        for i, (length, tokens) in enumerate(zip(PROMPTS, sequences)):
            rows = model(tokens[:, :-1]).logits[0, length - 1 :]
            tensors[f"{name}_{i}"] = rows.contiguous().cpu()

    logits("eager", model)
    model.set_attn_implementation("sdpa")
    logits("sdpa", model)
    logits("fp32", model.float())
    save_file(tensors, os.path.join(folder, "reference.safetensors"))
    print(folder, "done", flush=True)


def main():
    out = sys.argv[1]
    models = sys.argv[2] if len(sys.argv) > 2 else os.path.join(HERE, "../../schema/models")
    for name, keys in configs(models):
        write(os.path.join(out, name), keys)


main()
