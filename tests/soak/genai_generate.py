"""Continue chats greedily with onnxruntime-genai: a JSON request on stdin, a JSON answer as the last line of stdout."""

import json
import sys

import numpy as np
import onnxruntime_genai as genai

request = json.load(sys.stdin)
model = genai.Model(request["folder"])
tokenizer = genai.Tokenizer(model)
chats = [
    tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": prompt}]), add_generation_prompt=True)
    for prompt in request["prompts"]
]
ids = tokenizer.encode_batch(chats) if len(chats) > 1 else tokenizer.encode(chats[0])
params = genai.GeneratorParams(model)
width = ids.shape()[-1] if callable(getattr(ids, "shape", None)) else np.asarray(ids).shape[-1]
params.set_search_options(batch_size=len(chats), max_length=width + request["new_tokens"], do_sample=False)
generator = genai.Generator(model, params)
generator.append_tokens(ids)
tokens = []
while not generator.is_done():
    generator.generate_next_token()
    tokens.append(np.asarray(generator.get_next_tokens()))
print(json.dumps({"tokens": np.stack(tokens, axis=1).tolist()}))
