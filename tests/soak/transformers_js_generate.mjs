// Continue chats greedily with transformers.js: a JSON request on stdin, a JSON answer as the last line of stdout.
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

const request = JSON.parse(readFileSync(0, 'utf8'));
env.allowRemoteModels = false;
env.localModelPath = dirname(request.folder);
const name = basename(request.folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { subfolder: '' });
tokenizer.padding_side = 'left';
const chats = request.prompts.map((content) =>
    tokenizer.apply_chat_template([{ role: 'user', content }], { tokenize: false, add_generation_prompt: true }),
);
const inputs = tokenizer(chats, { padding: true, add_special_tokens: false });
try {
    const tokens = await model.generate({ ...inputs, max_new_tokens: request.new_tokens, do_sample: false });
    console.log(JSON.stringify({ tokens: tokens.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number)) }));
} catch (error) {
    console.log(JSON.stringify({ error: String(error) }));
}
