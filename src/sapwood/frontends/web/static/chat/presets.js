// System prompts: some to begin with, and those that the user has named.

import { byId, element, notice } from "./dom.js";

const KEPT = "sapwood-presets";
const MAX_PRESETS = 50;

const OWN = [
  ["Brief", "Answer in as few words as the question allows. Say so if you are not sure."],
  ["Teacher", "Explain step by step, for somebody who is new to the subject. Give one example."],
  ["Programmer", "You are an experienced programmer. Answer with code first, then explain it in short."],
  ["Editor", "Correct the grammar and style of the text that you are given. Reply with the text only."],
];

let named = [];

export function showPresets() {
  named = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
  list();
  byId("preset").addEventListener("change", choose);
  byId("save-preset").addEventListener("click", save);
  byId("delete-preset").addEventListener("click", remove);
  byId("preset-name").addEventListener("keydown", (event) => {
    if (event.key === "Enter") save();
  });
  byId("system").addEventListener("input", () => {
    byId("preset").value = "";
    mark();
  });
}

function list(chosen = "") {
  const option = ([name]) => element("option", { value: name }, name);
  const first = element("option", { value: "" }, "Choose…");
  byId("preset").replaceChildren(first, ...named.map(option), ...OWN.map(option));
  byId("preset").value = chosen;
  mark();
}

function mark() {
  const chosen = byId("preset").value;
  byId("delete-preset").disabled = !named.some(([name]) => name === chosen);
}

function choose() {
  const found = [...named, ...OWN].find(([name]) => name === byId("preset").value);
  if (found) {
    byId("system").value = found[1];
    byId("system").dispatchEvent(new Event("change"));
  }
  mark();
}

function save() {
  const name = byId("preset-name").value.trim();
  const text = byId("system").value.trim();
  if (!name || !text) {
    notice("A preset needs a name and a system prompt.", { isError: true });
    return;
  }
  const others = [...named, ...OWN].filter(([one]) => one !== name);
  if (others.length < named.length + OWN.length && OWN.some(([one]) => one === name)) {
    notice(`“${name}” is one of the page’s own presets; choose another name.`, { isError: true });
    return;
  }
  named = [[name, text], ...named.filter(([one]) => one !== name)];
  if (named.length > MAX_PRESETS) {
    named.pop();
    notice(`Only ${MAX_PRESETS} presets are kept; the oldest one is gone.`);
  }
  byId("preset-name").value = "";
  keep(name);
  notice(`The preset “${name}” is kept in this browser.`);
}

function remove() {
  const gone = byId("preset").value;
  named = named.filter(([name]) => name !== gone);
  keep();
}

function keep(chosen) {
  localStorage.setItem(KEPT, JSON.stringify(named));
  list(chosen);
}
