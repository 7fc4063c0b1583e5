// The chat page. It talks to the same server by OpenAI's dialect and keeps nothing beyond itself.

import { renderMarkdown } from "./markdown.js";

const byId = (id) => document.getElementById(id);

const conversation = byId("conversation");
const welcome = byId("welcome");
const prompt = byId("prompt");
const sendButton = byId("send");
const stopButton = byId("stop");

/** What the model is told: {role, content}, without the system prompt. */
let messages = [];
/** Aborts the answer that is being written, if one is. */
let running = null;

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  // isComposing: Enter there accepts a word of an input method.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(prompt.value);
  }
});
prompt.addEventListener("input", fitPrompt);
stopButton.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("new-chat").addEventListener("click", newChat);
byId("toggle-settings").addEventListener("click", toggleSettings);
conversation.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.classList.contains("idea")) send(button.textContent);
  if (button?.dataset.action === "copy") copyCode(button);
});
byId("api-key").addEventListener("change", showModel);
showModel();
if (matchMedia("(min-width: 70rem)").matches) toggleSettings();

async function showModel() {
  try {
    const response = await fetch("v1/models", { headers: keyHeader() });
    if (response.status === 401) {
      byId("model").textContent = "needs an API key: see Settings";
      return;
    }
    const { data } = await response.json();
    byId("model").textContent = data[0].id;
    document.title = `${data[0].id} – sapwood chat`;
  } catch {
    byId("model").textContent = "not ready";
  }
}

async function send(text) {
  if (running || !text.trim()) return;
  const invalid = document.querySelector("#settings input:invalid");
  if (invalid) {
    if (byId("settings").hidden) toggleSettings();
    invalid.reportValidity();
    return;
  }
  welcome.hidden = true;
  const asked = addMessage("user", "You");
  asked.body.textContent = text;
  messages.push({ role: "user", content: text });
  prompt.value = "";
  fitPrompt();

  const answer = addMessage("assistant", byId("model").textContent || "Model");
  answer.box.classList.add("busy");
  // Read aloud once it is complete, not word by word.
  answer.box.setAttribute("aria-busy", "true");
  const chat = messages;
  running = new AbortController();
  const mine = running;
  showRunning(true);
  const state = { text: "", startedMs: performance.now(), firstMs: null, lastMs: null, usage: null };
  const view = liveView(answer, state);
  try {
    await streamAnswer(requestBody(chat), mine.signal, state, view);
  } catch (error) {
    if (mine.signal.aborted) {
      state.stopped = true;
    } else {
      showError(answer, error);
      if (!state.text && !prompt.value) prompt.value = text;
    }
  }
  view.finish();
  answer.box.classList.remove("busy");
  answer.box.removeAttribute("aria-busy");
  // Of a failed question without any answer nothing is kept, so that roles go on alternating.
  if (state.text) chat.push({ role: "assistant", content: state.text });
  else chat.pop();
  if (running === mine) {
    running = null;
    showRunning(false);
    prompt.focus();
  }
}

/** The key is kept in the page only, like all else. */
function keyHeader() {
  const key = byId("api-key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function requestBody(chat) {
  const system = byId("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...chat] : [...chat],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const [id, field] of [
    ["temperature", "temperature"],
    ["top-p", "top_p"],
    ["max-tokens", "max_completion_tokens"],
    ["seed", "seed"],
  ]) {
    const value = byId(id).value;
    if (value !== "") body[field] = Number(value);
  }
  return body;
}

async function streamAnswer(body, signal, state, view) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeader() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await errorMessage(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) state.usage = event.usage;
    const choice = event.choices[0];
    if (choice?.finish_reason) state.finishReason = choice.finish_reason;
    if (!choice?.delta.content) continue;
    state.lastMs = performance.now();
    state.firstMs ??= state.lastMs;
    state.firstTokens ??= event.usage?.completion_tokens ?? 1;
    state.text += choice.delta.content;
    view.changed();
  }
}

async function errorMessage(response) {
  try {
    const body = await response.json();
    return (body.error ?? body).message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** The JSON of each `data:` event up to [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    pending += value;
    const complete = pending.split("\n\n");
    pending = complete.pop();
    for (const event of complete) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Draws the growing answer at most once per frame, and keeps the end in view if it was. */
function liveView(answer, state) {
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follow =
      conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 80;
    renderMarkdown(answer.body, state.text);
    answer.stats.textContent = statsLine(state);
    if (follow) conversation.scrollTop = conversation.scrollHeight;
  };
  return {
    changed() {
      frame ||= requestAnimationFrame(draw);
    },
    finish() {
      cancelAnimationFrame(frame);
      draw();
    },
  };
}

function statsLine(state) {
  const parts = [];
  if (state.firstMs !== null) {
    parts.push(`first token ${duration(state.firstMs - state.startedMs)}`);
  }
  const numTokens = state.usage?.completion_tokens;
  if (numTokens) parts.push(`${numTokens} token${numTokens === 1 ? "" : "s"}`);
  const elapsedS = (state.lastMs - state.firstMs) / 1000;
  if (numTokens > state.firstTokens && elapsedS > 0.05) {
    // The first tokens' time is the prefill's; the rate is of those after them. What comes within a
    // frame or two was waiting in a buffer and says nothing about the model.
    parts.push(`${((numTokens - state.firstTokens) / elapsedS).toFixed(1)} tokens/s`);
  }
  if (state.stopped) parts.push("stopped");
  if (state.finishReason === "length") parts.push("cut off by the token limit");
  if (state.finishReason === "abort") parts.push("aborted by the server");
  return parts.join(" · ");
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

function addMessage(role, name) {
  const box = document.createElement("article");
  box.className = `message ${role}`;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = name;
  const body = document.createElement("div");
  body.className = "body";
  const stats = document.createElement("div");
  stats.className = "stats";
  box.append(who, body, stats);
  conversation.append(box);
  conversation.scrollTop = conversation.scrollHeight;
  return { box, body, stats };
}

function showError(answer, error) {
  const note = document.createElement("div");
  note.className = "error";
  note.setAttribute("role", "alert");
  note.textContent = error.message;
  answer.box.append(note);
}

function showRunning(isRunning) {
  sendButton.hidden = isRunning;
  stopButton.hidden = !isRunning;
}

function newChat() {
  running?.abort();
  running = null;
  messages = [];
  for (const message of conversation.querySelectorAll(".message")) message.remove();
  welcome.hidden = false;
  showRunning(false);
  prompt.focus();
}

function toggleSettings() {
  const settings = byId("settings");
  settings.hidden = !settings.hidden;
  byId("toggle-settings").setAttribute("aria-expanded", String(!settings.hidden));
}

async function copyCode(button) {
  const code = button.closest(".code").querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
  } catch {
    // The clipboard needs HTTPS or localhost; select the text, so that Ctrl+C works.
    getSelection().selectAllChildren(button.closest(".code").querySelector("code"));
    button.textContent = "Selected";
  }
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}
