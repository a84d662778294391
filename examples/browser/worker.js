// One exported directory in the stock transformers.js: loads it, then answers one question after another.
// A worker, since a run of a graph holds up its thread. The graph itself judges the prompt and refuses.
import {
  AutoModelForImageTextToText,
  AutoProcessor,
  env,
  RawImage,
  TextStreamer,
} from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

// All files come from this folder, and none is kept: a directory that is exported again keeps its address.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;

const { directory, device } = Object.fromEntries(new URL(import.meta.url).searchParams);
const say = (...message) => postMessage(message);
const loading = load();
loading.then(
  ({ model, seconds }) => say("loaded", { seconds, sasa: model.config.sasa }),
  (error) => say("failed", String(error)),
);

async function load() {
  const start = performance.now();
  const processor = await AutoProcessor.from_pretrained(directory);
  // config.json says which graphs there are, so no dtype is named.
  const model = await AutoModelForImageTextToText.from_pretrained(directory, { device });
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    const output = await forward(inputs);
    const [probability] = output.unsafe_probability.data;
    if (!Number.isNaN(probability)) say("probability", probability); // NaN: this call completes no prompt
    return output;
  };
  return { processor, model, seconds: (performance.now() - start) / 1000 };
}

/** What the model is fed; `picture` is a Blob, or null. */
async function encode(processor, question, picture) {
  const content = [{ type: "text", text: question }];
  if (picture) content.unshift({ type: "image" });
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const options = { add_special_tokens: false };
  // LLaVA's order: the processors of other families take the text first.
  return picture ? processor(await RawImage.fromBlob(picture), text, options) : processor.tokenizer(text, options);
}

async function answer({ question, picture, tokens }) {
  const { processor, model } = await loading;
  const start = performance.now();
  const times = []; // seconds after the start, one for each token
  const streamer = new TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    callback_function: (text) => say("text", text),
    token_callback_function: () => times.push((performance.now() - start) / 1000),
  });
  const inputs = await encode(processor, question, picture);
  await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false, streamer });
  const [first, last] = [times[0], times.at(-1)];
  say("answered", { first, each: (last - first) / Math.max(1, times.length - 1) });
}

onmessage = ({ data }) => answer(data).catch((error) => say("failed", String(error)));
