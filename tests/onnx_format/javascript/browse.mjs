// Use the page of examples/browser as a person does, in headless Chromium, and say what it shows.
//
//     node browse.mjs CHROMIUM ADDRESS QUESTION [pick=a.png] [drop=b.png] [paste=c.png] [--screenshot page.png]
//
// --flag is one more of Chromium's, as --flag=--enable-unsafe-webgpu.
// The question is asked with each picture in turn, and without one where there is none. Prints one JSON object:
// `loaded` and `asked`, a list, hold what stands in the two columns then.
import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { screenshot: { type: "string" }, flag: { type: "string", multiple: true, default: [] } },
});
const [executablePath, address, question, ...pictures] = positionals;
const browser = await chromium.launch({
  executablePath,
  // Nothing else is found: a page that asks another host for anything does not work here.
  args: ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", ...values.flag],
});
const page = await browser.newPage({ viewport: { width: 960, height: 480 }, deviceScaleFactor: 1.25 });
page.setDefaultTimeout(300_000);
page.on("console", (message) => console.error(message.text()));
page.on("pageerror", (error) => console.error(error));

/** What the columns show, once both are in one of these states. */
async function columns(...states) {
  const sections = states.map((state) => `section[data-state=${state}]`).join();
  await page.waitForFunction((sections) => document.querySelectorAll(sections).length === 2, sections);
  const entries = ["before", "after"].map(async (name) => {
    const [state, probability, answer, note] = await Promise.all(
      [".state", "output", ".answer", ".note"].map((part) => page.locator(`#${name} ${part}`).innerText()),
    );
    return [name, { state, probability: Number(probability), answer, note }];
  });
  return Object.fromEntries(await Promise.all(entries));
}

async function give(way, path) {
  if (way === "pick") return await page.setInputFiles("input[type=file]", path);
  const bytes = await readFile(path, "base64");
  const data = await page.evaluateHandle(async (bytes) => {
    const blob = await (await fetch(`data:image/png;base64,${bytes}`)).blob();
    const transfer = new DataTransfer();
    transfer.items.add(new File([blob], "picture.png", { type: blob.type }));
    return transfer;
  }, bytes);
  if (way === "drop") return await page.dispatchEvent("#picture", "drop", { dataTransfer: data });
  await page.evaluate((data) => document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data })), data);
}

await page.goto(address);
await page.fill("#question", question);
const loaded = await columns("ready", "failed");
const asked = [];
for (const picture of pictures.length ? pictures : [undefined]) {
  if (picture) await give(...picture.split("=", 2));
  await page.click("#ask");
  asked.push(await columns("answered", "refused", "failed"));
  if (values.screenshot && asked.length === 1) await page.screenshot({ path: values.screenshot, fullPage: true });
}
await browser.close();
console.log(JSON.stringify({ loaded, asked }));
