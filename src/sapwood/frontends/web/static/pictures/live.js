// The live page of a server that draws. It asks its own server once a second.

import { bytes, duration } from "../units.js";
import { apiKey, ask, keepApiKey } from "../chat/api.js";
import { byId } from "../chat/dom.js";

const POLL_MS = 1000;
const SPAN = 10; // samples over which rates are taken
const COUNTS = [
  ...["num_waiting", "num_denoising", "num_decoding"],
  ...["num_done", "num_failed", "num_aborted", "num_late", "num_refused"],
];

let samples = [];

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepApiKey(byId("key").value);
  byId("key-form").hidden = true;
  poll();
});

async function poll() {
  try {
    const response = await ask("dashboard/figures", { headers: {} });
    take(await response.json());
  } catch (error) {
    const isLocked = error.status === 401 || error.status === 403;
    showState(isLocked ? "locked" : "no connection", false);
    byId("key-form").hidden = !isLocked || Boolean(apiKey() && byId("key").value);
    if (isLocked) return;
  }
  setTimeout(poll, POLL_MS);
}

function take(figures) {
  byId("model").textContent = figures.model;
  document.title = `${figures.model} – sapwood dashboard`;
  byId("about").textContent = `version ${figures.version}, up for ${duration(figures.uptime_s)}`;
  showState(figures.state, figures.state === "ready");
  const now = figures.status;
  if (!now) return;
  // An engine that was started anew counts from 0 again.
  if (samples.length && now.num_steps < samples.at(-1).num_steps) samples = [];
  samples.push({ ...now, at_s: figures.at_s });
  samples = samples.slice(-SPAN);
  for (const name of COUNTS) byId(name).textContent = now[name].toLocaleString("en");
  byId("resident_bytes").textContent = bytes(now.resident_bytes);
  byId("peak").textContent = `of the engine, at most ${bytes(now.peak_bytes)}`;
  const [first, last] = [samples[0], samples.at(-1)];
  const taken = last.num_trajectory_steps - first.num_trajectory_steps;
  const calls = last.num_steps - first.num_steps;
  const seconds = last.at_s - first.at_s;
  byId("step-rate").textContent = seconds > 0 ? (taken / seconds).toFixed(1) : "–";
  byId("together").textContent = calls > 0 ? (taken / calls).toFixed(1) : "–";
}

function showState(text, isReady) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("ready", isReady);
  state.classList.toggle("failing", !isReady);
}

poll();
