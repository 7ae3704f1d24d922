// Lightning Recipe shows only the inputs that its method has. Values of hidden ones are kept, and not read.
import { app } from "../../scripts/app.js";

const COMMON = ["predictor", "start", "end", "max_consecutive_hits"];
const SKIPS = ["skip_double", "skip_single"];
const SHOWN = {
  none: SKIPS,
  fbcache: ["threshold", ...COMMON, ...SKIPS],
  mbcache: ["threshold", "thresholds", ...COMMON, ...SKIPS],
  teacache: ["threshold", ...COMMON, ...SKIPS],
  easycache: ["threshold", ...COMMON, ...SKIPS],
  interval: ["every", "growth", ...COMMON, ...SKIPS],
  file: ["file"],
};

function showWhatMatters(node) {
  const value = (name) => node.widgets.find((w) => w.name === name)?.value;
  const shown = new Set(SHOWN[value("method")] ?? []);
  if (shown.has("predictor") && value("predictor") === "taylor") shown.add("order");
  for (const widget of node.widgets) {
    if (widget.name !== "method") widget.hidden = !shown.has(widget.name);
  }
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "lightning.recipe",
  nodeCreated(node) {
    if (node.comfyClass !== "LightningRecipe") return;
    for (const name of ["method", "predictor"]) {
      const widget = node.widgets?.find((w) => w.name === name);
      if (!widget) return;
      const before = widget.callback;
      widget.callback = function (...args) {
        const result = before?.apply(this, args);
        showWhatMatters(node);
        return result;
      };
    }
    const configured = node.onConfigure;
    node.onConfigure = function (...args) {
      configured?.apply(this, args);
      showWhatMatters(node);
    };
    showWhatMatters(node);
  },
});

// The original pack's example was saved before Load Sana CLIP had a max_length: name, device, dtype.
app.registerExtension({
  name: "lightning.sana",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SanaCLIPLoader") return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (info, ...rest) {
      const saved = info?.widgets_values;
      if (Array.isArray(saved) && saved.length === 3) {
        info = { ...info, widgets_values: [saved[0], 300, saved[1], saved[2]] };
      }
      return configure.call(this, info, ...rest);
    };
  },
});
