// The settings: one table makes their inputs, keeps their values in this browser, and fills requests.

import { byId, element, notice } from "./dom.js";

const KEPT = "sapwood-settings";

const number = (id, label, field, limits = {}, hint = "Default") => ({
  id, label, field, hint, type: "number", step: "any", ...limits, read: Number,
});

/** Whatever is empty is left to the server. `thinking`: only for models whose thinking is told apart. */
const FIELDS = [
  number("set-temperature", "Temperature", "temperature", { min: 0 }),
  number("set-top-p", "Top p", "top_p", { min: 0.001, max: 1 }),
  number("set-top-k", "Top k", "top_k", { min: -1, step: 1 }),
  number("set-min-p", "Min p", "min_p", { min: 0, max: 1 }),
  number("set-repetition-penalty", "Repetition penalty", "repetition_penalty", { min: 0.01, max: 2 }),
  number("set-frequency-penalty", "Frequency penalty", "frequency_penalty", { min: -2, max: 2 }, "0"),
  number("set-presence-penalty", "Presence penalty", "presence_penalty", { min: -2, max: 2 }, "0"),
  number("set-max-tokens", "Max tokens", "max_completion_tokens", { min: 1, step: 1 }, "No limit"),
  number("set-seed", "Seed", "seed", { step: 1 }, "Random"),
  { id: "set-stop", label: "Stop texts, one per line", field: "stop", hint: "None", read: lines },
  {
    id: "set-effort",
    label: "Thinking",
    field: "reasoning_effort",
    options: ["", "none", "minimal", "low", "medium", "high"],
    read: String,
    thinking: true,
  },
  number("set-thinking-budget", "Thinking tokens", "thinking_budget", { min: 0, step: 1 }, "No limit"),
  { id: "set-extra", label: "Other fields, as JSON", hint: '{"regex": "[a-z]+"}', read: jsonObject },
];
FIELDS.find(({ id }) => id === "set-thinking-budget").thinking = true;

/** Make the inputs, with the values of last time. */
export function showSettings() {
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  for (const field of FIELDS) {
    const input = inputOf(field);
    input.id = field.id;
    input.value = kept[field.id] ?? "";
    input.addEventListener("change", keep);
    const label = element("label", { htmlFor: field.id }, field.label);
    byId("parameters").append(element("div", { class: "field", id: `${field.id}-field` }, label, input));
  }
  byId("reset").addEventListener("click", () => {
    for (const field of FIELDS) byId(field.id).value = "";
    keep();
    notice("All parameters are the server’s again.");
  });
}

/** Show the settings of thinking only for a model that has it. */
export function showThinkingSettings(hasReasoning) {
  for (const { id, thinking } of FIELDS) if (thinking) byId(`${id}-field`).hidden = !hasReasoning;
}

/** The request's fields; null, with the input shown and its fault said, if one is impossible. */
export function readSettings() {
  const body = {};
  for (const { id, field, read } of FIELDS) {
    const input = byId(id);
    if (byId(`${id}-field`).hidden) continue;
    input.setCustomValidity("");
    try {
      if (input.value.trim()) Object.assign(body, field ? { [field]: read(input.value) } : read(input.value));
    } catch (error) {
      input.setCustomValidity(error.message);
    }
    if (!input.checkValidity()) {
      byId("settings").hidden = false;
      byId("toggle-settings").ariaExpanded = "true";
      input.reportValidity();
      return null;
    }
  }
  return body;
}

function inputOf({ options, type, hint = "", min = "", max = "", step = "" }) {
  if (options) {
    const choices = options.map((value) => element("option", { value }, value || "Default"));
    return element("select", {}, ...choices);
  }
  if (type) return element("input", { type, min, max, step, placeholder: hint });
  return element("textarea", { rows: 2, placeholder: hint, spellcheck: false });
}

function keep() {
  const values = FIELDS.map(({ id }) => [id, byId(id).value]).filter(([, value]) => value);
  localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(values)));
}

function lines(text) {
  return text.split("\n").filter(Boolean);
}

function jsonObject(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new Error('Write an object, such as {"min_tokens": 5}.');
  }
  for (const name of ["messages", "stream", "stream_options", "model", "n"]) {
    if (name in value) throw new Error(`The page itself sets ${name}.`);
  }
  return value;
}
