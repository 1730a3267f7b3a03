"""The page that `page.write_page` fills with data: `{{title}}` and `{{data}}` are the places."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{title}}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #1b1b1b; background: #fafafa; }
header { padding: 14px 22px 0; }
h1 { font-size: 20px; margin: 0 0 2px; }
header p, #note { color: #555; margin: 0; font-size: 13px; }
main { display: flex; flex-wrap: wrap; gap: 22px; padding: 14px 22px 28px; align-items: flex-start; }
#stage { flex: 0 1 560px; min-width: 280px; }
#panel { flex: 1 1 340px; min-width: 300px; max-width: 760px; }
canvas { width: 100%; display: block; border: 1px solid #bbb; background: #fff; }
h2 { font-size: 14px; margin: 16px 0 6px; }
#panel h2:first-child { margin-top: 0; }
button { font: inherit; cursor: pointer; border: 1px solid #b5b5b5; border-radius: 5px; background: #fff; }
button[aria-pressed="true"] { outline: 3px solid #D55E00; outline-offset: 1px; border-color: #D55E00; }
#tokens button { font-family: ui-monospace, monospace; font-size: 14px; padding: 2px 7px; margin: 0 5px 6px 0;
 min-width: 26px; }
#heads { display: grid; gap: 4px 5px; justify-content: start; overflow-x: auto; padding: 4px; }
#heads span { font-size: 12px; color: #555; align-self: center; white-space: nowrap; }
#heads button { font-size: 11px; padding: 4px 2px; min-width: 46px; line-height: 1.2; }
#legend { display: flex; align-items: center; gap: 8px; font-size: 12px; color: #555; margin-top: 8px; }
#ramp { height: 10px; flex: 1; border: 1px solid #bbb; }
label { font-size: 13px; margin-right: 16px; white-space: nowrap; }
#note { margin-top: 8px; }
#readout { font-size: 14px; margin: 10px 0 0; min-height: 3em; }
</style>
</head>
<body>
<header><h1>{{title}}</h1><p id="prompt"></p></header>
<main>
<section id="stage">
<canvas id="page" role="img" aria-label="The page under the attention of the chosen head"></canvas>
<div id="legend"><span>0</span><div id="ramp"></div><span id="peak"></span></div>
<p id="readout" aria-live="polite"></p>
</section>
<section id="panel">
<h2>Token read</h2>
<div id="tokens"></div>
<h2>Head <span style="font-weight:normal">(<span id="headnote"></span>)</span></h2>
<div id="heads"></div>
<h2>View</h2>
<label id="partbox">Part of the image <select id="part"></select></label>
<label>Strength <input id="opacity" type="range" min="0" max="100" value="100"></label>
<p id="note">Arrow keys: left and right change the token, up and down the head.</p>
</section>
</main>
<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
for (const part of data.parts) part.values = Uint8Array.from(atob(part.weights), c => c.charCodeAt(0));
const numHeads = data.heads.length, numTokens = data.tokens.length;
const state = { token: -1, head: 0, part: 0 };  // token -1: the mean over all of them
const canvas = byId("page"), context = canvas.getContext("2d");
const picture = new Image();

function weightsOf() {
  const part = data.parts[state.part], size = part.rows * part.cols, mean = new Float64Array(size);
  const tokens = state.token < 0 ? [...Array(numTokens).keys()] : [state.token];
  for (const token of tokens) {
    const start = (token * numHeads + state.head) * size;
    const scale = data.peaks[token][state.head] / 255 / tokens.length;
    for (let i = 0; i < size; i++) mean[i] += part.values[start + i] * scale;
  }
  return mean;
}

function draw() {
  const part = data.parts[state.part], weights = weightsOf(), opacity = byId("opacity").value / 100;
  let peak = 0, at = 0;
  weights.forEach((w, i) => { if (w > peak) { peak = w; at = i; } });
  context.globalAlpha = 1;
  context.filter = "grayscale(1)";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  const [left, top, right, bottom] = part.region;  // as shares of the page
  const width = canvas.width * (right - left) / part.cols, height = canvas.height * (bottom - top) / part.rows;
  const xOf = col => Math.round(left * canvas.width + col * width);
  const yOf = row => Math.round(top * canvas.height + row * height);
  context.globalAlpha = opacity;
  context.globalCompositeOperation = data.light ? "multiply" : "screen";  // the text keeps its contrast
  weights.forEach((w, i) => {
    const colour = data.colours[Math.round(255 * (peak ? w / peak : 0))];
    context.fillStyle = `rgb(${colour.join(",")})`;
    const row = Math.floor(i / part.cols), col = i % part.cols;
    context.fillRect(xOf(col), yOf(row), xOf(col + 1) - xOf(col), yOf(row + 1) - yOf(row));
  });
  context.globalAlpha = 1;
  context.globalCompositeOperation = "source-over";
  const row = Math.floor(at / part.cols), col = at % part.cols;
  for (const [colour, share] of [["#fff", 120], ["#0072B2", 250]]) {  // seen on light and on dark pages
    context.strokeStyle = colour;
    context.lineWidth = Math.max(2, canvas.width / share);
    context.strokeRect(xOf(col), yOf(row), width, height);
  }
  const head = data.heads[state.head], all = state.token < 0;
  const onImage = all
    ? data.on_image.reduce((sum, line) => sum + line[state.head], 0) / numTokens
    : data.on_image[state.token][state.head];
  const name = all ? "all tokens" : `token ${state.token} (${JSON.stringify(data.tokens[state.token])})`;
  byId("peak").textContent = peak.toPrecision(3);
  const largest = `largest ${all ? "mean " : ""}weight ${peak.toPrecision(3)} at row ${row}, column ${col}`;
  const falls = `${(100 * onImage).toFixed(1)} % of its attention falls on the image.`;
  byId("readout").textContent = `Layer ${head.layer}, head ${head.head}, ${name}: ${largest}; ${falls}`;
  document.querySelectorAll("#tokens button").forEach(b => b.ariaPressed = String(+b.dataset.token === state.token));
  document.querySelectorAll("#heads button").forEach(b => b.ariaPressed = String(+b.dataset.head === state.head));
  byId("part").value = state.part;
  document.body.dataset.shown = `${state.token} ${head.layer}-${head.head} ${part.name} ${row} ${col}`;
}

function set(changes) { Object.assign(state, changes); draw(); }

function button(text, attribute, value, title, pick) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.title = title;
  element.dataset[attribute] = value;
  element.addEventListener("click", pick);
  return element;
}

function build() {
  byId("prompt").textContent = "Asked: " + data.prompt;
  const tokens = byId("tokens");
  tokens.append(button("all", "token", -1, "mean over all tokens", () => set({ token: -1 })));
  data.tokens.forEach((text, i) => {
    const shown = text.trim() ? text : text ? "\\u2423" : "\\u2205";
    tokens.append(button(shown, "token", i, `token ${i}: ${JSON.stringify(text)}`, () => set({ token: i })));
  });
  const layers = [...new Set(data.heads.map(h => h.layer))].sort((a, b) => a - b);
  const most = Math.max(...layers.map(layer => data.heads.filter(h => h.layer === layer).length));
  const heads = byId("heads");
  heads.style.gridTemplateColumns = `max-content repeat(${most}, minmax(46px, 62px))`;
  const scored = data.heads[0].share !== null, largest = Math.max(...data.heads.map(h => h.share || 0), 1e-12);
  byId("headnote").textContent = scored ? "its number, and its share of the visual score" : "its number";
  for (const layer of layers) {
    const name = document.createElement("span");
    name.textContent = `layer ${layer}`;
    heads.append(name);
    const mine = data.heads.map((h, i) => [h, i]).filter(([h]) => h.layer === layer);
    mine.sort(([a], [b]) => a.head - b.head);
    for (let column = 0; column < most; column++) {
      if (column >= mine.length) { heads.append(document.createElement("span")); continue; }
      const [h, i] = mine[column];
      const share = scored ? ` ${(100 * h.share).toFixed(1)}%` : "";
      const element = button(`${h.head}${share}`, "head", i, `layer ${layer}, head ${h.head}`, () => set({ head: i }));
      if (scored) {
        const [r, g, b] = data.colours[Math.round(255 * h.share / largest)];
        element.style.background = `rgb(${r},${g},${b})`;
        element.style.color = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff";
      }
      heads.append(element);
    }
  }
  data.parts.forEach((part, i) => byId("part").add(new Option(`${part.name} (${part.rows} x ${part.cols})`, i)));
  byId("partbox").hidden = data.parts.length < 2;
  byId("part").addEventListener("change", event => set({ part: +event.target.value }));
  byId("opacity").addEventListener("input", draw);
  const stops = data.colours.filter((_, i) => i % 15 === 0).map(c => `rgb(${c.join(",")})`);
  byId("ramp").style.background = `linear-gradient(to right, ${stops.join(",")})`;
  document.addEventListener("keydown", event => {
    if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    set({
      token: Math.min(numTokens - 1, Math.max(-1, state.token + step[0])),
      head: Math.min(numHeads - 1, Math.max(0, state.head + step[1])),
    });
  });
}

build();
picture.onload = () => {
  const scale = Math.max(1, Math.ceil(840 / Math.max(data.width, data.height)));
  canvas.width = data.width * scale;
  canvas.height = data.height * scale;
  draw();
};
picture.src = data.image;
</script>
</body>
</html>
"""
