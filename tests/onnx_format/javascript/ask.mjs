// Ask an exported directory with the stock transformers.js, and say what its processor fed and what was answered.
//
//     node ask.mjs PARENT NAME PICTURE TOKENS PROMPT...
//
// Each prompt is asked with the picture and without. Prints one JSON list.
import { AutoModelForImageTextToText, AutoProcessor, env, RawImage } from "@huggingface/transformers";

const [parent, name, picture, tokens, ...prompts] = process.argv.slice(2);
env.localModelPath = parent;
env.allowRemoteModels = false;
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { device: "cpu" });
const image = await RawImage.read(picture);

const said = [];
for (const prompt of prompts) {
  for (const pictures of [[image], []]) {
    const content = [...pictures.map(() => ({ type: "image" })), { type: "text", text: prompt }];
    const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const picturesFirst = ["LlavaProcessor", "PixtralProcessor", "Lfm2VlProcessor"].includes(processor.constructor.name);
    const both = picturesFirst ? [pictures, text] : [text, pictures];
    const inputs = pictures.length ? await processor(...both) : processor.tokenizer(text);
    const output = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
    const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
    const fed = Object.entries(inputs).filter(([, value]) => value?.dims);
    said.push({
      inputs: Object.fromEntries(fed.map(([key, { dims, data }]) => [key, { dims, data: [...data].map(Number) }])),
      tokens: [...answer.data].map(Number),
    });
  }
}
console.log(JSON.stringify(said));
