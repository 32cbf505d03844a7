"""Small models that know a text by heart, with tokenizers, and what Hugging Face transformers makes of them.

    python3 engine/tests/trained_model.py OUT TEXT_FILE...
    PLUMBLINE_TRAINED=OUT cargo test --release -p plumbline-engine --test gpu -- --nocapture
    plumb generate --model OUT/llama-bf16 --prompt "..."

A tokenizer and a model of the Llama and one of the Qwen3 family are trained on the text files for a few hundred steps on the
GPU and saved by `save_pretrained` in bf16 and fp16. Beside each stands `generated.json`: prompts out of the text and the 64
tokens that transformers gives them greedily, the weights rounded to bf16 as the engine rounds them. A model that knows a text
is sure of its tokens, so that an engine must give the very same.
"""

import json
import os
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

NEW_TOKENS = 64
VOCABULARY = 4096
SEQUENCE = 256
BATCH = 32
STEPS = 900
# With what follows, no longer than what the model was trained on.
PROMPT_LENGTHS = [1, 5, 16, 33, 100, 180]
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
             num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
             tie_word_embeddings=False)


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(config, tokens):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - SEQUENCE, (BATCH,), generator=generator)
        batch = torch.stack([tokens[i : i + SEQUENCE] for i in starts.tolist()]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    print(config.model_type, "loss", round(loss.item(), 3), flush=True)
    return model


@torch.no_grad()
def write(folder, model, dtype, tokenizer, tokens):
    os.makedirs(folder, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    cases = []
    for i, length in enumerate(PROMPT_LENGTHS):
        start = 1000 * (i + 1) % (len(tokens) - length)
        # As text and back: a cut piece of text may split in another way.
        prompt = tokenizer.decode(tokens[start : start + length].tolist())
        ids = tokenizer.encode(prompt).ids
        out = served.generate(torch.tensor([ids]).cuda(), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
        cases.append(dict(prompt=prompt, prompt_token_ids=ids, completion_token_ids=out.tolist(),
                          completion=tokenizer.decode(out.tolist())))
    with open(os.path.join(folder, "generated.json"), "w") as file:
        json.dump(cases, file)
    print(folder, "done", flush=True)


def main():
    out, files = sys.argv[1], sys.argv[2:]
    texts = []
    for name in sorted(files):
        with open(name) as file:
            texts.append(file.read())
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer.encode("\n".join(texts)).ids)
    print(len(tokens), "tokens of text", flush=True)
    for name, config in [("llama", LlamaConfig(**SHAPE)), ("qwen3", Qwen3Config(**SHAPE))]:
        model = train(config, tokens)
        for dtype in [torch.float16, torch.bfloat16]:
            write(os.path.join(out, f"{name}-{'fp16' if dtype == torch.float16 else 'bf16'}"), model, dtype, tokenizer, tokens)


main()
