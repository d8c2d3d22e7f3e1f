"""Continue chats greedily with optimum: a JSON request on stdin, a JSON answer as the last line of stdout.

Runs in an environment of its own (`make soak`): optimum-onnx wants older transformers than lrserve.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["folder"], padding_side="left")
model = ORTModelForCausalLM.from_pretrained(request["folder"])
chats = [
    tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    for prompt in request["prompts"]
]
inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
try:
    tokens = model.generate(**inputs, max_new_tokens=request["new_tokens"], do_sample=False)
    print(json.dumps({"tokens": tokens[:, inputs["input_ids"].shape[1] :].tolist()}))
except Exception as error:  # ONNX Runtime's have no base class of their own
    print(json.dumps({"error": str(error)}))
