// The gateway's live page. It asks its own gateway once a second.

import { duration } from "./units.js";

const byId = (id) => document.getElementById(id);
const POLL_MS = 1000;
const GOOD = new Set(["ready", "closed"]);
const BAD = new Set(["unhealthy", "failed", "open"]);

let before = null;
let apiKey = sessionStorage.getItem("sapwood-key") ?? "";

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
    const response = await fetch("dashboard/figures", { headers });
    if (response.status === 401 || response.status === 403) {
      showState("locked", false);
      byId("key-form").hidden = false;
      byId("key").focus();
      return;
    }
    if (!response.ok) throw new Error(`status ${response.status}`);
    show(await response.json());
  } catch {
    showState("no connection", false);
  }
  setTimeout(poll, POLL_MS);
}

function show(figures) {
  byId("policy").textContent = figures.policy;
  byId("about").textContent = `up for ${duration(figures.uptime_s)}`;
  showState(figures.state, figures.state === "ready");
  byId("ready").textContent = figures.num_ready;
  byId("ready-note").textContent = `of ${figures.workers.length} ready`;
  byId("open").textContent = figures.num_open;
  byId("waiting").textContent = figures.num_waiting;
  byId("retries").textContent = figures.num_retries.toLocaleString("en");
  byId("rate").textContent = rate(figures);
  byId("hit-rate").textContent = figures.known_bytes === null || !figures.prompt_bytes
    ? "–"
    : `${Math.round((100 * figures.known_bytes) / figures.prompt_bytes)}%`;
  byId("worker-rows").replaceChildren(...figures.workers.map(row));
  byId("no-workers").hidden = figures.workers.length > 0;
  before = figures;
}

/** Answers per second since the last look; a gateway that was started anew counts from 0 again. */
function rate(figures) {
  if (!before || figures.uptime_s <= before.uptime_s) return "–";
  const perSecond = (figures.num_answers - before.num_answers) / (figures.uptime_s - before.uptime_s);
  return perSecond.toFixed(perSecond >= 10 || perSecond === 0 ? 0 : 1);
}

function row(worker) {
  const tr = document.createElement("tr");
  const texts = [
    worker.url,
    worker.status,
    worker.circuit_breaker.replace("_", " "),
    worker.models.join(", "),
    worker.load,
    worker.num_requests.toLocaleString("en"),
    worker.num_failures.toLocaleString("en"),
    worker.last_error ?? "",
  ];
  for (const text of texts) {
    const td = document.createElement("td");
    td.textContent = text;
    if (GOOD.has(text)) td.className = "good";
    if (BAD.has(text)) td.className = "bad";
    tr.append(td);
  }
  return tr;
}

function showState(text, isReady) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("ready", isReady);
  state.classList.toggle("failing", !isReady);
}

poll();
