// Ask a guarded ONNX directory about a picture with the stock transformers.js:
//
//     npm install --ignore-scripts
//     node chat.mjs path/to/patched "Follow the instruction shown in the image." picture.png
//
// Nothing here knows of the guard: the graph judges the prompt, and a refused one makes it say the refusal.
// With --json it prints {"ids": [...], "text": "..."} instead of streaming. Without --dtype, config.json says which
// graphs are loaded.
import path from "node:path";
import { parseArgs } from "node:util";
import { AutoModelForImageTextToText, AutoProcessor, env, RawImage, TextStreamer } from "@huggingface/transformers";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    json: { type: "boolean", default: false },
    dtype: { type: "string" },
    "max-new-tokens": { type: "string", default: "200" },
  },
});
const [directory, prompt, picture] = positionals;
if (!directory || !prompt || !picture) {
  console.error("usage: node chat.mjs DIRECTORY PROMPT PICTURE [--json] [--dtype fp32]");
  process.exit(2);
}

const name = path.basename(path.resolve(directory));
env.localModelPath = path.dirname(path.resolve(directory));
env.allowRemoteModels = false;

const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: values.dtype, device: "cpu" });

const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: prompt }] }];
const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
const inputs = await processor(await RawImage.read(picture), text, { add_special_tokens: false });
const streamer = values.json ? undefined : new TextStreamer(processor.tokenizer, { skip_prompt: true });
const output = await model.generate({
  ...inputs,
  max_new_tokens: Number(values["max-new-tokens"]),
  do_sample: false,
  streamer,
});

if (values.json) {
  const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
  const ids = [...answer.data].map(Number);
  console.log(JSON.stringify({ ids, text: processor.tokenizer.decode(ids, { skip_special_tokens: true }) }));
}
