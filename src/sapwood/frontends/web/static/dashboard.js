// The live page. It asks its own server once a second and keeps the last five minutes.

import { showMemory } from "./memory.js";
import { duration, niceTicks } from "./units.js";

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SPAN_S = 300;
const POLL_MS = 1000;
const WIDTH = 480;
const HEIGHT = 150;
const LEFT = 46;
const BOTTOM = 18;
const CLASSES = ["first", "second", "third"];

let samples = [];
let next = 0;
let apiKey = sessionStorage.getItem("sapwood-key") ?? "";

const count = (value) => (value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1));
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)}%`;
const rounded = (value) => Number(value.toPrecision(3));
const time = (seconds) =>
  seconds < 1 ? `${rounded(1000 * seconds)} ms` : `${rounded(seconds)} s`;
const percentiles = (name) =>
  ["p50", "p95", "p99"].map((label, i) => ({ label, value: (sample) => sample[name][i] }));

const charts = [
  makeChart("chart-requests", count, [
    { label: "running", value: (sample) => sample.num_running },
    { label: "waiting", value: (sample) => sample.num_waiting },
  ]),
  makeChart("chart-tokens", count, [
    { label: "output", value: (sample) => sample.output_tokens_per_s },
    { label: "prompt", value: (sample) => sample.prompt_tokens_per_s },
  ]),
  makeChart("chart-ttft", time, percentiles("ttft_s")),
  makeChart("chart-itl", time, percentiles("itl_s")),
  makeChart(
    "chart-cache",
    percent,
    [
      { label: "cache hits", value: (sample) => sample.cache_hit_rate },
      { label: "pool in use", value: (sample) => sample.token_usage },
    ],
    1,
  ),
];

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = byId("key").value;
  sessionStorage.setItem("sapwood-key", apiKey);
  byId("key-form").hidden = true;
  poll();
});

async function poll() {
  try {
    const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
    const response = await fetch(`dashboard/figures?since=${next}`, { headers });
    if (response.status === 401 || response.status === 403) {
      showState("locked", false);
      byId("key-form").hidden = false;
      byId("key").focus();
      return;
    }
    if (!response.ok) throw new Error(`status ${response.status}`);
    take(await response.json());
  } catch {
    showState("no connection", false);
  }
  setTimeout(poll, POLL_MS);
}

function take(figures) {
  // A server that was started anew counts from 0 again.
  if (figures.next < next) samples = [];
  next = figures.next;
  samples.push(...figures.samples);
  const latest = samples.at(-1);
  if (latest) samples = samples.filter((sample) => sample.at_s > latest.at_s - SPAN_S);
  byId("model").textContent = figures.model;
  document.title = `${figures.model} – sapwood dashboard`;
  byId("about").textContent = `version ${figures.version}, up for ${duration(figures.uptime_s)}`;
  showState(figures.state, figures.state === "ready");
  showTiles(latest, figures.kv);
  for (const chart of charts) chart.draw();
  showMemory(figures);
  showTotals(figures.requests);
}

function showState(text, isReady) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("ready", isReady);
  state.classList.toggle("failing", !isReady);
}

function showTiles(latest, kv) {
  if (!latest) return;
  byId("running").textContent = latest.num_running;
  byId("waiting").textContent = latest.num_waiting;
  byId("output-rate").textContent = count(Math.round(latest.output_tokens_per_s));
  byId("prompt-rate").textContent = count(Math.round(latest.prompt_tokens_per_s));
  const withHits = samples.findLast((sample) => sample.cache_hit_rate !== null);
  byId("hit-rate").textContent = withHits ? percent(withHits.cache_hit_rate) : "–";
  byId("usage").textContent = percent(latest.token_usage);
  if (kv) byId("usage-note").textContent = `of ${kv.max_tokens.toLocaleString("en")} tokens`;
}

function showTotals(requests) {
  const names = ["num_requests", "num_finished", "num_aborted", "num_refused", "num_open"];
  const cells = byId("totals").children;
  names.forEach((name, i) => {
    cells[i].textContent = requests[name].toLocaleString("en");
  });
}

/** A line chart below its caption; the legend tells the values under the pointer, else the last. */
function makeChart(id, format, lines, fixedTop = 0) {
  const figure = byId(id);
  const legend = document.createElement("ul");
  legend.className = "legend";
  const values = lines.map(({ label }, i) => {
    const item = document.createElement("li");
    const key = document.createElement("span");
    key.className = `key ${CLASSES[i]}`;
    const value = document.createElement("b");
    item.append(key, `${label} `, value);
    legend.append(item);
    return value;
  });
  const svg = element("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.setAttribute("preserveAspectRatio", "none");
  const grid = element("g", {});
  const paths = lines.map((_, i) => element("path", { class: CLASSES[i] }));
  const cursor = element("line", { class: "cursor", y1: 0, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(grid, ...paths, cursor);
  figure.append(legend, svg);

  const caption = figure.querySelector("figcaption").firstChild.textContent.trim();
  let pointedAt = null;
  const x = (atS) => LEFT + (WIDTH - LEFT) * (1 - (samples.at(-1).at_s - atS) / SPAN_S);

  function draw() {
    if (!samples.length) return;
    // The drawing keeps the pixels of its place, so that text is not stretched.
    const { width, height } = svg.getBoundingClientRect();
    const shape = { sx: WIDTH / (width || WIDTH), sy: HEIGHT / (height || HEIGHT) };
    const known = samples.flatMap((sample) => lines.map(({ value }) => value(sample) ?? 0));
    const ticks = fixedTop ? [0, fixedTop / 2, fixedTop] : niceTicks(Math.max(...known));
    const y = (value) => 8 + (HEIGHT - BOTTOM - 8) * (1 - value / ticks.at(-1));
    grid.replaceChildren(...gridOf(ticks, y, format, shape));
    lines.forEach(({ value }, i) => paths[i].setAttribute("d", pathOf(value, x, y)));
    showValues();
  }

  function showValues() {
    const sample = pointedAt === null ? samples.at(-1) : nearest(pointedAt);
    if (!sample) return;
    const texts = lines.map(({ value }) => (value(sample) === null ? "–" : format(value(sample))));
    texts.forEach((text, i) => {
      values[i].textContent = text;
    });
    if (pointedAt === null) {
      svg.setAttribute("aria-label", `${caption}: ${lines.map((l, i) => `${l.label} ${texts[i]}`).join(", ")}`);
    } else {
      cursor.setAttribute("x1", x(sample.at_s));
      cursor.setAttribute("x2", x(sample.at_s));
    }
    cursor.setAttribute("visibility", pointedAt === null ? "hidden" : "visible");
  }

  svg.addEventListener("pointermove", (event) => {
    if (!samples.length) return;
    const { left, width } = svg.getBoundingClientRect();
    const share = ((event.clientX - left) / width) * WIDTH;
    pointedAt = samples.at(-1).at_s - SPAN_S * (1 - (share - LEFT) / (WIDTH - LEFT));
    showValues();
  });
  svg.addEventListener("pointerleave", () => {
    pointedAt = null;
    showValues();
  });
  return { draw };
}

function nearest(atS) {
  return samples.reduce((best, sample) =>
    Math.abs(sample.at_s - atS) < Math.abs(best.at_s - atS) ? sample : best,
  );
}

/** A gap where there is no value. */
function pathOf(value, x, y) {
  let path = "";
  let isDown = false;
  for (const sample of samples) {
    const known = value(sample);
    if (known === null) {
      isDown = false;
      continue;
    }
    path += `${isDown ? "L" : "M"}${x(sample.at_s).toFixed(1)} ${y(known).toFixed(1)}`;
    isDown = true;
  }
  return path;
}

function gridOf(ticks, y, format, { sx, sy }) {
  const parts = [];
  for (const tick of ticks) {
    parts.push(element("line", { x1: LEFT, x2: WIDTH, y1: y(tick), y2: y(tick) }));
    parts.push(label(LEFT - 6 * sx, y(tick) + 4 * sy, format(tick), "end", sx, sy));
  }
  for (const [minutes, anchor] of [[5, "start"], [2.5, "middle"], [0, "end"]]) {
    const at = LEFT + (WIDTH - LEFT) * (1 - minutes / 5);
    parts.push(label(at, HEIGHT, minutes ? `-${minutes} min` : "now", anchor, sx, sy));
  }
  return parts;
}

function label(x, y, text, anchor, sx, sy) {
  const node = element("text", { "text-anchor": anchor, transform: `translate(${x} ${y}) scale(${sx} ${sy})` });
  node.textContent = text;
  return node;
}

function element(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

poll();
