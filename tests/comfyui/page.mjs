// ComfyUI's page in a real browser: loads graphs, tells what the page would send, runs one, reads what stands on it.
//   node page.mjs http://127.0.0.1:8188 plan.json folder-for-pictures
// plan.json: {"graphs": {name: workflow}, "run": [name, ...], "recipe": true}. Prints one JSON object.
// Needs playwright-core (npm; PLAYWRIGHT names the folder that has its node_modules) and a chromium (CHROMIUM).
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.env.PLAYWRIGHT ?? process.cwd();
const { chromium } = createRequire(pathToFileURL(folder + "/"))("playwright-core");
const [address, planFile, pictures] = process.argv.slice(2);
const plan = JSON.parse(readFileSync(planFile, "utf8"));
const seen = { graphs: {}, ended: {}, lines: {}, errors: [] };
const PAGE = { width: 1720, height: 960 };
// What bars and panels leave free.
const FREE = { x: 70, y: 100, width: 1640, height: 790 };
const MARGIN = 24;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
const page = await browser.newPage({ viewport: PAGE });
page.setDefaultTimeout(300000); // a loaded machine takes its time
page.on("pageerror", (error) => seen.errors.push(String(error)));
await page.goto(address);
await page.waitForFunction(() => window.LiteGraph?.registered_node_types?.Lightning && window.app?.graph);
await page.waitForTimeout(3000);
await page.keyboard.press("Escape"); // the template dialog of a first visit
await page.evaluate(() => {
  for (const name of ["Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"]) {
    window.app.extensionManager?.setting?.set?.(name, false);
  }
});

// Brings the whole graph into the free part of the page.
const fit = () =>
  page.evaluate(([free, margin]) => {
    const { graph, canvas } = window.app;
    const nodes = graph._nodes ?? graph.nodes;
    const low = (i) => Math.min(...nodes.map((n) => n.pos[i])) - (i ? 30 : 0);
    const high = (i) => Math.max(...nodes.map((n) => n.pos[i] + n.size[i]));
    const width = high(0) - low(0);
    const height = high(1) - low(1);
    const scale = Math.min((free.width - 2 * margin) / width, (free.height - 2 * margin) / height, 1.2);
    canvas.ds.scale = scale;
    canvas.ds.offset = [
      (free.x + (free.width - width * scale) / 2) / scale - low(0),
      (free.y + (free.height - height * scale) / 2) / scale - low(1),
    ];
    canvas.setDirty(true, true);
  }, [FREE, MARGIN]);

for (const [name, graph] of Object.entries(plan.graphs)) {
  await page.evaluate(([g, called]) => window.app.loadGraphData(g, true, true, called), [graph, name]);
  await page.waitForTimeout(1500);
  await page.keyboard.press("Escape"); // where it names model files that are not here
  seen.graphs[name] = await page.evaluate(async () => {
    const { output } = await window.app.graphToPrompt();
    const nodes = window.app.graph._nodes ?? window.app.graph.nodes;
    const known = window.LiteGraph.registered_node_types;
    return { output, unknown: nodes.map((n) => n.type).filter((type) => !(type in known)) };
  });
  await fit();
  await page.waitForTimeout(1000);
  await page.screenshot({ path: join(pictures, `${name}.jpg`), clip: FREE, quality: 80, type: "jpeg" });
  if (!plan.run.includes(name)) continue;
  await page.evaluate(() => {
    window.ended = new Promise((resolve) => {
      const api = window.app.api ?? window.comfyAPI.api.api;
      for (const event of ["execution_success", "execution_error", "execution_interrupted"]) {
        api.addEventListener(event, () => resolve(event), { once: true });
      }
    });
    return window.app.queuePrompt(0);
  });
  seen.ended[name] = await page.evaluate(() => window.ended);
  await page.waitForTimeout(3000);
  const texts = await page.evaluate(() =>
    (window.app.graph._nodes ?? window.app.graph.nodes)
      .map((node) => [node.type, node.widgets?.find((w) => w.name === "$$node-text-preview")?.value])
      .filter(([, text]) => text),
  );
  seen.lines[name] = Object.fromEntries(texts);
  await fit();
  await page.waitForTimeout(2000);
  await page.screenshot({ path: join(pictures, `${name} after a run.png`) });
  const made = await page.evaluate(() => {
    const picture = (window.app.graph._nodes ?? window.app.graph.nodes).find((n) => n.type === "SaveImage")?.imgs?.[0];
    if (!picture) return null;
    const sheet = document.createElement("canvas");
    sheet.width = sheet.height = 512;
    const pen = sheet.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture, 0, 0, 512, 512);
    return sheet.toDataURL("image/jpeg", 0.92).split(",")[1];
  });
  if (made) writeFileSync(join(pictures, `${name}.jpg`), Buffer.from(made, "base64"));
}

// Lightning Recipe: which widgets are shown for each method, and whether hidden ones keep their values.
if (plan.recipe) {
  seen.recipe = await page.evaluate(async () => {
    const { graph } = window.app;
    graph.clear();
    const node = window.LiteGraph.createNode("LightningRecipe");
    graph.add(node);
    const shown = (of) => of.widgets.filter((w) => !w.hidden).map((w) => w.name);
    const set = (name, value) => {
      const widget = node.widgets.find((w) => w.name === name);
      widget.value = value;
      widget.callback?.(value);
    };
    const methods = {};
    for (const method of node.widgets[0].options.values) {
      set("method", method);
      methods[method] = shown(node);
    }
    set("method", "fbcache");
    set("predictor", "hold");
    const held = shown(node);
    set("threshold", 0.12);
    set("every", 7); // hidden: fbcache has no such thing
    set("max_consecutive_hits", -1);
    const saved = JSON.parse(JSON.stringify(graph.serialize()));
    await window.app.loadGraphData(saved);
    const again = (window.app.graph._nodes ?? window.app.graph.nodes)[0];
    const { output } = await window.app.graphToPrompt();
    return { methods, held, reloaded: shown(again), inputs: Object.values(output)[0]?.inputs };
  });
}
await browser.close();
console.log(JSON.stringify(seen));
