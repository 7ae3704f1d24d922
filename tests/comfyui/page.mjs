// Loads a template into ComfyUI's page in a real browser, runs it, and prints what stands on the Lightning node.
//   node page.mjs http://127.0.0.1:8188 template.json screenshot.png
// Needs playwright-core (npm) and a chromium; CHROMIUM names its path.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// From where it was installed (PLAYWRIGHT names the folder), not from beside this file.
const folder = process.env.PLAYWRIGHT ?? process.cwd();
const { chromium } = createRequire(pathToFileURL(folder + "/"))("playwright-core");
const [address, template, screenshot] = process.argv.slice(2);

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
const page = await browser.newPage({ viewport: { width: 1720, height: 960 } });
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
await page.goto(address);
await page.waitForFunction(() => window.LiteGraph?.registered_node_types?.Lightning && window.app?.graph, null, {
  timeout: 180000,
});
await page.waitForTimeout(2000);
await page.evaluate(async (graph) => {
  await window.app.loadGraphData(graph);
  const api = window.app.api ?? window.comfyAPI.api.api;
  window.ended = new Promise((resolve) => {
    for (const name of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(name, (event) => resolve({ name, detail: event.detail }));
    }
  });
}, JSON.parse(readFileSync(template, "utf8")));
await page.keyboard.press("Escape");
await page.evaluate(() => window.app.queuePrompt(0));
const ended = await page.evaluate(() => window.ended);
await page.waitForTimeout(3000);
const lines = await page.evaluate(() =>
  Object.fromEntries(
    window.app.graph.nodes
      .filter((node) => node.widgets?.some((w) => w.name === "$$node-text-preview"))
      .map((node) => [node.type, String(node.widgets.find((w) => w.name === "$$node-text-preview").value)]),
  ),
);
const shown = await page.evaluate(() => document.body.innerText.includes("computed "));
await page.screenshot({ path: screenshot });
await browser.close();
console.log(JSON.stringify({ ended: ended.name, lines, shown, errors }));
